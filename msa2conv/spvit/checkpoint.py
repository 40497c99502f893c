"""The authors' released checkpoints as plain hybrids."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..conversion import Conversion, decided_report
from ..errors import InvalidCheckpoint
from ..kernels import Values, centre
from ..laws import check_costs
from ..observation import check_finite_weights
from ..ops import Conv
from ..options import Option
from ..plan import Replace
from ..planning import make_plan, site_costs
from ..report.inspection import Inspection
from ..search.gates import Gates, mixer_option, width_option
from ..sites import AttentionSite, FFNSite
from ..transforms.apply import apply
from ..transforms.gates import is_open
from ..transforms.single_path import NAMES, Branch
from ..workbench import unwrap, working_copy
from .authors import MERGED, Checkpoint, Source, family_of, theirs
from .published import FINETUNED, look
from .recipe import GATES

Tensors = Mapping[str, Tensor]


def load_checkpoint(
    source: Source, model: nn.Module, *, gates: Gates | None = None, example_inputs: Tensor | None = None
) -> Conversion:
    """Read a checkpoint of the authors' code into a plain hybrid.

    The form is recognised by the keys. Search: thresholds decide, a skipped attention adds nothing, and Swin convolves
    inside its windows, as in the paper's search. Fine-tune (head mixtures) and merged (convolutions): a skipped
    attention returns LN1(x), and Swin convolves on the whole map. Kernels are merged.

    Args:
        source: a file, which is read with `weights_only=True`, or what `torch.load` returned.
        model: timm's DeiT or Swin of the same geometry; its weights do not matter, and it is not touched.
        gates: alpha and order of positions, where a checkpoint was trained with other ones than the authors'.
        example_inputs: as for `convert`.

    Returns:
        A Conversion without calibration: a plain module of the model's own class, which saves and loads as any other.

    Raises:
        InvalidCheckpoint: no file, would have to be unpickled, none of the three forms, missing or unknown keys.
        ArchitectureMismatch: the other family, or other widths.
        NonFiniteValue: NaN or Inf in the weights.

    Example:
        model = timm.create_model("deit_tiny_patch16_224")
        result = msa2conv.spvit.load_checkpoint("spvit_deit_tiny.pth", model)
    """
    started = time.perf_counter()
    original = unwrap(model)
    work, seen = look(original, example_inputs)
    family = family_of(seen.claims)
    checkpoint = Checkpoint(source, family)
    reader = _Reader(checkpoint, work, seen, gates or GATES[family])
    choices, tensors = reader.read()
    checkpoint.check(seen.claims)
    plan, _ = make_plan(original, seen, choices)
    hybrid = apply(plan, original, tensors)
    check_finite_weights(hybrid)
    image = torch.zeros(1, *seen.input_size, device=next(hybrid.parameters()).device)
    laws = check_costs(working_copy(hybrid), plan, choices, seen.costs, image, None)
    seconds = {"load": round(time.perf_counter() - started, 2)}
    decided_by = f"{checkpoint.where} (SPViT's {checkpoint.form} form)"
    known = {"seconds": seconds, "device": image.device, "sites": site_costs(seen, choices)}
    return Conversion(hybrid, plan, decided_report(plan, decided_by, laws, **known), None)


class _Reader:
    """Takes every tensor of the hybrid out of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, seen: Inspection, gates: Gates) -> None:
        self.checkpoint, self.model, self.seen, self.gates = checkpoint, model, seen, gates
        self.lowered = gates.model_copy(update={"skip": "zero"}) if checkpoint.form == "search" else FINETUNED

    def read(self) -> tuple[dict[str, Option], dict[str, Tensor]]:
        """({site: what it is}, {name in the hybrid: value})."""
        claims = self.seen.claims
        sites = tuple(f"{site.path}." for site in claims.sites)
        choices, tensors = dict[str, Option](), dict[str, Tensor]()
        for name, value in self.model.state_dict().items():
            if not name.startswith(sites):
                tensors[name] = self.checkpoint.take(theirs(name, self.checkpoint.family), *value.shape)
        for site in claims.attentions:
            choices[site.path], found = self._attention(site)
            tensors |= {f"{site.path}.{name}": value for name, value in found.items()}
        for ffn in claims.ffns:
            choices[ffn.path], found = self._ffn(ffn)
            tensors |= {f"{ffn.path}.{name}": value for name, value in found.items()}
        return choices, tensors

    def _attention(self, site: AttentionSite) -> tuple[Option, Tensors]:
        branch = self._branch(site)
        option = mixer_option(site, branch, self.seen.costs, self.lowered)
        if branch == "attention":
            host = self.model.get_submodule(site.path)
            return option, host_tensors(self.checkpoint, site.path, host.state_dict())
        if branch == "skip":
            return option, {}
        (edit,) = option.edits
        assert isinstance(edit, Replace) and isinstance(edit.spec, Conv)
        with torch.device("meta"):
            wanted = edit.spec.build(edit.io).state_dict()
        if self.checkpoint.form == "merged":
            return option, {name: self._take_merged(site.path, name, value) for name, value in wanted.items()}
        found = self._kernel(site, edit.spec.kernel)
        norm = f"{site.path}.bn_{edit.spec.kernel}x{edit.spec.kernel}"
        for name, value in wanted.items():
            if name.startswith("norm."):
                found[name] = self.checkpoint.take(f"{norm}.{name.removeprefix('norm.')}", *value.shape)
        return option, found

    def _branch(self, site: AttentionSite) -> Branch:
        path, checkpoint = site.path, self.checkpoint
        if checkpoint.form == "search":
            theta = checkpoint.take(thresholds(checkpoint, path), 3)
            return NAMES[int(is_open(theta).int().cumprod(0).sum())]
        if f"{path}.bconv.0.weight" in checkpoint:
            return "conv1x1" if checkpoint.state[f"{path}.bconv.0.weight"].shape[-1] == 1 else "conv3x3"
        norms = [name for name in ("1x1", "3x3") if f"{path}.bn_{name}.weight" in checkpoint]
        if len(norms) == 2:
            raise InvalidCheckpoint(
                checkpoint.where, f"{path}.bn_1x1.weight and {path}.bn_3x3.weight, but no thresholds",
                "one of them in the fine-tune form, or attn.kernel_thresholds in the search form",
                "Read the file whole.",
            )  # fmt: skip
        if norms:
            return "conv1x1" if norms == ["1x1"] else "conv3x3"
        return "attention" if any(f"{path}.{name}.weight" in checkpoint for name in ("qk", "v")) else "skip"

    def _take_merged(self, path: str, name: str, value: Tensor) -> Tensor:
        part, leaf = name.split(".")
        return self.checkpoint.take(f"{path}.{MERGED[part]}.{leaf}", *value.shape)

    def _kernel(self, site: AttentionSite, side: int) -> dict[str, Tensor]:
        """Merge V, proj and the head mixture."""
        named = site.projections
        assert named is not None
        heads, head_dim, take, at = named.heads, named.head_dim, self.checkpoint.take, site.path
        inner = heads * head_dim
        host = self.model.get_submodule(at)
        _, bias = named.v.read(host)
        values = Values(
            take(f"{at}.v.weight", inner, site.dim).reshape(heads, head_dim, site.dim),
            torch.zeros(heads, head_dim) if bias is None else take(f"{at}.v.bias", inner).reshape(heads, head_dim),
            take(f"{at}.proj.weight", site.dim, inner).reshape(site.dim, heads, head_dim),
            take(f"{at}.proj.bias", site.dim),
        )
        mixture_KS = (take(f"{at}.head_probs", heads, 9) / self.gates.alpha).softmax(0)
        if side == 1:
            mixture_KS = mixture_KS[:, [centre(self.gates.offsets)]]
        return values.conv(mixture_KS, self.gates.offsets).state()

    def _ffn(self, site: FFNSite) -> tuple[Option, Tensors]:
        """In the search form open gates are kept, else whatever the checkpoint holds."""
        checkpoint, path = self.checkpoint, site.path
        if checkpoint.form == "search":
            width = site.hidden
            kept = is_open(checkpoint.take(f"{path}.ffn_thresholds", width)).nonzero().flatten().tolist()
        else:
            first = checkpoint.state.get(f"{path}.{site.units.hanging[0][0]}")
            width = site.hidden if first is None else min(*first.shape[:1], site.hidden)
            kept = list(range(width))
        axes, tensors = {path: dim for path, dim, *_ in site.units.hanging}, dict[str, Tensor]()
        for name, value in self.model.get_submodule(path).state_dict().items():
            shape = [width if axis == axes.get(name) else side for axis, side in enumerate(value.shape)]
            found = checkpoint.take(f"{path}.{name}", *shape)
            if name in axes:
                # A closed FFN keeps one unit of zeros: a layer of width 0 is no layer.
                found = _select(found, axes[name], kept) if kept else torch.zeros_like(_select(value, axes[name], [0]))
            tensors[name] = found
        return width_option(site, kept or [0], self.seen.costs), tensors


def host_tensors(checkpoint: Checkpoint, path: str, wanted: Tensors) -> dict[str, Tensor]:
    """Tensors of an attention: the authors split qkv into qk, the first two thirds, and v."""
    found = {}
    for name, value in wanted.items():
        if name.startswith("qkv."):
            leaf, (rows, *rest) = name.removeprefix("qkv."), value.shape
            qk = checkpoint.take(f"{path}.qk.{leaf}", rows // 3 * 2, *rest)
            found[name] = torch.cat((qk, checkpoint.take(f"{path}.v.{leaf}", rows // 3, *rest)))
        else:
            found[name] = checkpoint.take(f"{path}.{name}", *value.shape)
    return found


def thresholds(checkpoint: Checkpoint, path: str) -> str:
    """Name of the three thresholds of an attention."""
    return f"{path}.kernel_thresholds" + ("_full" if checkpoint.family == "swin" else "")


def _select(value: Tensor, axis: int, kept: list[int]) -> Tensor:
    return value.index_select(axis, torch.tensor(kept, device=value.device))
