"""Discovery: which modules of an unknown backbone mix a map by a softmax, and which are FFNs. Proposed, not believed.

One forward pass is traced: every softmax knows which modules it ran in, and the innermost of them that maps tokens to
tokens of the same shape is an attention. What is proposed is tried out on the tensors that were seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import NoSitesFound
from ..observation import SAME, Given, Observation
from ..sites import AttentionSite, Projections, Refusal, listed
from ..transforms.groups import hidden_units
from .declared import FFN, Attention, Declarations, Where, qkv, separate
from .geometry import Geometry, Place, Unknown, channels_first, channels_last, tokens
from .trial import FAR, displaced, has_shortcut, projections_hold, silenced

_HEADS = ("num_heads", "heads", "n_heads", "n_head", "num_attention_heads", "nhead")
_JOINT = ("qkv", "to_qkv", "in_proj", "c_attn", "query_key_value", "proj_in", "Wqkv")
_VALUES = ("v", "to_v", "v_proj", "value", "w_v", "wv", "proj_v", "values", "v_lin")
_OUTS = ("proj", "to_out", "to_out.0", "out_proj", "o_proj", "out", "proj_out", "c_proj", "fc_out", "unifyheads", "wo")


@dataclass(frozen=True)
class Found:
    """One class of modules, or one module, that is proposed.

    Args:
        path: of the first module.
        kind: its class.
        times: how many there are.
        code: how it would be declared.
        key, declared: its entry in the adapter.
    """

    path: str
    kind: str
    times: int
    code: str
    key: Any
    declared: Attention | FFN


@dataclass(frozen=True)
class Discovery:
    """What `discover` proposes: `print` it, and pass `adapters=[proposal.adapter]` where you agree.

    Args:
        found: attentions and FFNs.
        refusals: what has a softmax, and why it is not proposed.
    """

    found: tuple[Found, ...]
    refusals: tuple[Refusal, ...] = field(default=())

    @property
    def adapter(self) -> Declarations:
        """The proposal as an adapter."""
        attentions = {each.key: each.declared for each in self.found if isinstance(each.declared, Attention)}
        ffns = {each.key: each.declared for each in self.found if isinstance(each.declared, FFN)}
        return Declarations("discovered", attentions, ffns)

    def __str__(self) -> str:
        lines = ["proposed (look at it, then pass adapters=[proposal.adapter], or paste and edit):", ""]
        names = {name for each in self.found for name in re.findall(r"\b[A-Za-z_]+(?=\()|channels_\w+", each.code)}
        lines += [f"from msa2conv.adapters import {', '.join(sorted({'Declarations', *names}))}", ""]
        lines += ["Declarations(", '    "mine",']
        for kind in (Attention, FFN):
            entries = [each for each in self.found if isinstance(each.declared, kind)]
            lines.append("    {")
            lines += [f"        {each.code},  # {each.path}{_more(each.times)}" for each in entries]
            lines.append("    },")
        lines.append(")")
        attentions = [each for each in self.found if isinstance(each.declared, Attention)]
        blind = ", ".join(each.kind for each in attentions if "projections=" not in each.code)
        if blind:
            lines += ["", f"no W_v and W_o found in {blind}: the calibrated search needs none, a gate search does"]
        if self.refusals:
            lines += ["", "not proposed:", *(f"  {text}" for text in listed(self.refusals))]
        return "\n".join(lines)


def _more(times: int) -> str:
    return f" and {times - 1} more" if times > 1 else ""


def propose(model: nn.Module, seen: Observation) -> Discovery:
    """Propose sites from structure and from one traced forward pass.

    Args:
        model: a working copy, eval.
        seen: what it was observed on.

    Raises:
        NoSitesFound: nothing mixes a map by a softmax in a module of its own.
    """
    trace = _trace(model, seen.inputs)
    found: dict[Any, Found] = {}
    refusals: list[Refusal] = []
    attentions: set[str] = set()
    for path, lengths in _innermost(model, seen, trace).items():
        module, call = model.get_submodule(path), seen.once(path)
        assert call is not None
        attentions.add(path)
        try:
            kind, code = _attention(Place(model, module, path, call, seen), lengths, trace.calls[path])
        except Unknown as unknown:
            refusals.append(Refusal(path, type(module).__name__, str(unknown)))
            continue
        _add(found, path, module, kind, code)
    refusals += _tried(model, seen, found)
    for path, output in _ffns(model, seen, attentions):
        module = model.get_submodule(path)
        _add(found, path, module, FFN(output), f'FFN("{output}")')
    if not any(isinstance(each.declared, Attention) for each in found.values()):
        raise NoSitesFound(
            type(model).__name__,
            "; ".join(listed(refusals)) or "no softmax in its forward pass",
            "a module that maps a grid of tokens to itself through a softmax",
            "Give the attention a module of its own, then declare it (CONTRIBUTING.md, 'Add a backbone').",
        )
    return Discovery(tuple(found.values()), tuple(refusals))


def _add(found: dict[Any, Found], path: str, module: nn.Module, kind: Attention | FFN, code: str) -> None:
    key, name = (path, f'"{path}"') if _is_general(module) else (type(module), type(module).__name__)
    times = found[key].times + 1 if key in found else 1
    first = found[key].path if key in found else path
    found[key] = Found(first, type(module).__name__, times, f"{name}: {code}", key, kind)


@torch.no_grad()
def _tried(model: nn.Module, seen: Observation, found: dict[Any, Found]) -> list[Refusal]:
    """Take back what the model cannot do without, and whose tokens lie elsewhere."""
    refusals, sites = [], dict[Any, tuple[AttentionSite, ...]]()
    for key, each in list(found.items()):
        assert isinstance(each.declared, Attention)
        sites[key] = Declarations("discovered", {key: each.declared}).claims(model, seen).attentions
        try:
            silenced(model, sites[key])(seen.inputs)
        except Exception as error:  # whatever the model's own code raises
            reason = f"the model fails without what else it returns ({type(error).__name__}): declare echo or returns"
            refusals.append(Refusal(each.path, each.kind, reason))
            del found[key], sites[key]
    places = displaced(model, (site for group in sites.values() for site in group), seen.inputs)
    for key, group in sites.items():
        far = max((places[site.path] for site in group), default=1.0)
        if far > FAR:
            reason = f"its tokens do not lie row by row ({far:.0%} of a side away): declare their layout"
            refusals.append(Refusal(found[key].path, found[key].kind, reason))
            del found[key]
    return refusals


def _is_general(module: nn.Module) -> bool:
    """A Sequential, for example: only this very one is meant."""
    return type(module).__module__.startswith("torch.")


# The trace


@dataclass
class _Trace:
    """Softmaxes, with the modules that they ran in and the number of keys; arguments of every call that ran once."""

    softmaxes: list[tuple[tuple[str, ...], int]] = field(default_factory=list)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)


class _Listen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, stack: list[str], trace: _Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack, self.trace = stack, trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "softmax" in name and "log" not in name:
            self.trace.softmaxes.append((tuple(self.stack), int(args[0].shape[args[1]])))
        elif "scaled_dot_product" in name:
            self.trace.softmaxes.append((tuple(self.stack), int(args[1].shape[-2])))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _trace(model: nn.Module, inputs: Tensor) -> _Trace:
    trace, stack, handles = _Trace(), list[str](), []
    for path, module in model.named_modules():

        def enter(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            stack.append(path)
            trace.calls[path] = (args, kwargs)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Listen(stack, trace):
            model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for handle in handles:
            handle.remove()
    return trace


def _innermost(model: nn.Module, seen: Observation, trace: _Trace) -> dict[str, list[int]]:
    """{the innermost module with weights that maps tokens to tokens: the numbers of keys of its softmaxes}."""
    found: dict[str, list[int]] = {}
    for active, length in trace.softmaxes:
        for path in reversed(active):
            call = seen.once(path)
            own = path and call is not None and call.x is not None and call.x == call.out and len(call.x) in (3, 4)
            if own and any(True for _ in model.get_submodule(path).parameters()):
                found.setdefault(path, []).append(length)
                break
    return found


# Attentions


@torch.no_grad()
def _attention(place: Place, lengths: list[int], given: tuple[Any, Any]) -> tuple[Attention, str]:
    """The declaration of an attention, and its code; or Unknown."""
    module, call = place.module, place.call
    geometry, text = _geometry(place)
    layout = geometry(place)
    queries = math.prod(layout._window) + layout.prefix
    if not any(length == queries or (layout.positions % length == 0 and length > 1) for length in lengths):
        raise Unknown(f"its softmax runs over {lengths[0]} values, which are not its {queries} positions")
    others = [name for name, value in call.arguments.items() if value != SAME and isinstance(value, Given)]
    if others:
        raise Unknown(f"it is called with {others[0]!r}: declare it, as ignored if all it does is to place tokens")
    axes = {"tokens()": (1,), "channels_last": (1, 2), "channels_first": (2, 3)}.get(text, (0,))
    if has_shortcut(module, given, axes):
        raise Unknown("it holds a shortcut around the attention: give the attention a module of its own")
    heads = next((name for name in _HEADS if isinstance(getattr(module, name, None), int)), None)
    named, where = _projections(place, heads, given)
    same = tuple(name for name, value in call.arguments.items() if value == SAME)
    ignored = tuple(name for name, value in call.arguments.items() if value != SAME)
    parts = [text, f'heads="{heads}"' if heads else "heads=None"]
    parts += [f"projections={where}"] if named else []
    parts += [f"ignored={ignored}"] if ignored else []
    parts += [f"same={same}"] if same else []
    parts += ['returns="tuple"'] if call.returned > 1 else []
    returns: Any = "tuple" if call.returned > 1 else "tensor"
    kind = Attention(geometry, heads, named, ignored, same, returns)
    return kind, f"Attention({', '.join(parts)})"


def _geometry(place: Place) -> tuple[Geometry, str]:
    x = place.x
    width = next(
        (m.in_features if isinstance(m, nn.Linear) else m.in_channels
         for m in place.module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))), None,
    )  # fmt: skip
    width = getattr(place.module, "embed_dim", width) if width is None else width
    if len(x) == 3 and x[0] == 1:
        return tokens(), "tokens()"
    if len(x) == 3 and x[1] == 1:
        return tokens(pattern="(h w) b c"), 'tokens(pattern="(h w) b c")'
    if len(x) == 4 and x[0] == 1 and x[3] == width:
        return channels_last, "channels_last"
    if len(x) == 4 and x[0] == 1 and x[1] == width:
        return channels_first, "channels_first"
    raise Unknown(f"its input {x} is no sequence or map of one image: windows have to be declared")


def _projections(place: Place, heads: str | None, given: tuple[Any, Any]) -> tuple[Where | None, str]:
    """Where W_v and W_o are, if a trial on what was seen agrees."""
    if heads is None:
        return None, ""
    module = place.module
    candidates: Iterator[tuple[Where, str]] = (
        pair
        for out in _OUTS
        for pair in (
            *((qkv(name, out, heads), f'qkv("{name}", "{out}", "{heads}")') for name in _JOINT),
            *((separate(name, out, heads), f'separate("{name}", "{out}", "{heads}")') for name in _VALUES),
        )
    )
    for where, text in candidates:
        named: Projections | None = where(module)
        if named is not None and projections_hold(module, named, given):
            return where, text
    return None, ""


# FFNs


def _ffns(model: nn.Module, seen: Observation, attentions: set[str]) -> Iterator[tuple[str, str]]:
    """(module, output layer) of every FFN: a Linear that reads hidden units, in the innermost module it ends."""
    known: dict[tuple[str, str], bool] = {}
    for path, layer in model.named_modules():
        width = getattr(layer, "out_features", getattr(layer, "out_channels", None))
        inside = any(f"{path}.".startswith(f"{other}.") for other in attentions)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or inside:
            continue
        channels = 1 if isinstance(layer, nn.Conv2d) else -1
        candidates = []
        for parent, output in _around(path):
            call = seen.once(parent)
            if call is None or call.x is None or call.x != call.out or call.x[channels] != width:
                continue
            module = model.get_submodule(parent)
            key = (repr(module), output)
            if key not in known:
                known[key] = _narrows(module, output, call.x, dict(call.arguments))
            if known[key]:
                candidates.append((parent, output))
            if not known[key] or not _is_general(module):
                break
        yield from candidates[-1:]  # a class of the user's own says more than the Sequential in it


def _around(path: str) -> Iterator[tuple[str, str]]:
    """(module, path inside it) of the modules around a layer, innermost first."""
    parent = path.rpartition(".")[0]
    while parent:
        yield parent, path[len(parent) + 1 :]
        parent = parent.rpartition(".")[0]


def _narrows(module: nn.Module, output: str, shape: tuple[int, ...], arguments: dict[str, Any]) -> bool:
    units = hidden_units(module, output, shape, arguments)
    return not isinstance(units, str) and any(name != f"{output}.weight" for name, *_ in units.hanging)


__all__ = ["Discovery", "propose"]
