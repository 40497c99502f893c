"""FLOPs, counted once and exactly (the only importer of fvcore).

One multiply-add is one FLOP, as in fvcore, timm and every ViT-pruning paper; one forward pass at batch 1.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UncountedOperator
from .merging import comparisons
from .observation import Observation
from .ops import IO, Attend, Linear, MixerSpec, TokenMixer
from .options import Option
from .plan import Edit
from .sites import AttentionSite, FFNSite, Site, StreamSite
from .stream import Drop
from .transforms.apply import apply_edits
from .transforms.lift import lift
from .transforms.mergeable import Called

# Element-wise, softmax, activations, indexing, data movement: 0 by definition, listed so that anything else raises.
_ZERO_NAMES = """
abs add add_ addcmul alias all amax amin any argmax argsort as_strided atan2 avg_pool1d avg_pool2d bernoulli bernoulli_
bitwise_and bitwise_or broadcast_tensors ceil clamp_max clamp_max_ clamp_min clamp_min_ clone col2im cos cumsum diff div
div_ dropout_ elu embedding erf exp expand_as expm1 eye feature_dropout fill_ flip floor floor_divide_ fmod gelu gelu_
glu hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ hypot im2col index index_add index_add_ index_copy
index_put_ index_select is_nonzero isfinite item le leaky_relu leaky_relu_ lerp linalg_vector_norm linspace log log1p
log_softmax logical_and logical_not logical_or lt masked_fill masked_fill_ masked_scatter masked_select max max_pool1d
max_pool2d maximum mean meshgrid min minimum mish movedim mul mul_ narrow native_dropout ne neg new_empty new_full
new_ones new_zeros nonzero norm numel numpy_T one_hot ones ones_like outer pad pixel_shuffle pixel_unshuffle pow prelu
prod rand rand_like randn randperm reciprocal relu6 relu6_ remainder repeat repeat_interleave reshape_as resolve_conj
roll round rsqrt rsub scatter scatter_ scatter_add select_scatter selu sgn sigmoid sigmoid_ sign silu silu_ sin size
slice_scatter softmax softplus sort sqrt square stack std sub sub_ sum swapaxes take_along_dim tanh tensor_split tile
topk tril triu triu_ type_as unbind unflatten unfold uniform_ unsafe_chunk unsafe_split upsample_bicubic2d
_upsample_bicubic2d_aa upsample_linear1d var var_mean where zero_ zeros_like
"""
ZERO_FLOPS = frozenset(f"aten::{name}" for name in _ZERO_NAMES.split())


def count_flops(model: nn.Module, inputs: Tensor) -> int:
    """Multiply-adds of one forward pass.

    fvcore's rules for convolutions, matrix products and norms; fused attention counts as two matrix products (fvcore
    itself counts it as 0, which leaves out 4 to 14 % of a DeiT); element-wise operations, softmax and data movement
    are 0.

    Args:
        model: counted on a copy in eval mode; not touched.
        inputs: what it is called with; only the first image is used, so the figure is for batch 1.

    Returns:
        An integer.

    Raises:
        UncountedOperator: an operator that has neither a rule nor a place on the list of zeros.

    Example:
        >>> import torch
        >>> count_flops(torch.nn.Linear(8, 4), torch.zeros(1, 8))
        32
    """
    return flops_by_module(model, inputs[:1])[""]


def flops_by_module(model: nn.Module, inputs: Tensor) -> Counter[str]:
    """{module path: multiply-adds inside it} on these very inputs; "" is the whole model. See `count_flops`."""
    return _counted(copy.deepcopy(model).eval(), inputs)


def _counted(model: nn.Module, inputs: Tensor) -> Counter[str]:
    """`flops_by_module` of a model of ours in eval mode, which is traced itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # fvcore's import touches a deprecated part of torch
        from fvcore.nn import FlopCountAnalysis
        from fvcore.nn.jit_handles import elementwise_flop_counter, norm_flop_counter

    traced = _Traced(model)
    if logging.getLogger("fvcore").level != logging.ERROR:  # setting it empties the caches of all loggers
        logging.getLogger("fvcore").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(traced, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    for name in _FUSED_ATTENTION:
        analysis.set_op_handle(f"aten::{name}", _attention_flops)
    analysis.set_op_handle("aten::_native_multi_head_attention", _native_attention_flops)
    analysis.set_op_handle("aten::_transformer_encoder_layer_fwd", _encoder_layer_flops)
    for name in ("matmul", "bmm"):
        analysis.set_op_handle(f"aten::{name}", _matmul_flops)
    analysis.set_op_handle("aten::baddbmm", lambda i, o: _matmul_flops(i[1:], o))
    analysis.set_op_handle("aten::einsum", _einsum_flops)
    analysis.set_op_handle("aten::rms_norm", norm_flop_counter(2))
    analysis.set_op_handle("aten::adaptive_avg_pool1d", elementwise_flop_counter(1, 0))  # as fvcore's 2d
    analysis.set_op_handle("aten::_convolution_mode", _convolution_flops)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the tracer's deprecation and constant-folding notes are not the user's concern
        try:
            counts = analysis.by_module()
        finally:
            traced.unhook()
        unknown = {name: times for name, times in analysis.unsupported_ops().items() if name not in ZERO_FLOPS}
    if unknown:
        raise UncountedOperator(
            type(model).__name__,
            "operators without a FLOPs rule: " + ", ".join(f"{name} ({times}x)" for name, times in unknown.items()),
            "operators that the counter knows",
            "Add them to msa2conv.cost (ZERO_FLOPS, or a handle) rather than report a wrong figure.",
        )
    return Counter({path.removeprefix("model").removeprefix("."): int(flops) for path, flops in counts.items()})


class _Traced(nn.Module):
    """A model whose outputs include what its mixers ignore.

    GC ViT computes global queries also for a site that no longer asks for them. PyTorch runs them, so they count; the
    tracer would drop what leads to no output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.ignored = model, list[Tensor]()
        mixers = [module for module in model.modules() if isinstance(module, TokenMixer)]
        self._hooks = [mixer.register_forward_pre_hook(self._keep, with_kwargs=True) for mixer in mixers]

    def unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(mixer, TokenMixer)
        given = mixer.io.arguments(args, kwargs).values()
        # the tracer also wants all outputs to depend on the inputs, which a mask or a rotary embedding does not
        self.ignored += [value + 0 * self.anchor for value in given if isinstance(value, Tensor)]

    def forward(self, inputs: Tensor) -> Any:
        self.ignored.clear()
        self.anchor = inputs.sum()
        out = self.model(inputs)
        if isinstance(out, Mapping):
            out = tuple(value for value in out.values() if value is not None)  # which the tracer takes
        return (out, tuple(self.ignored)) if self.ignored else out


_FUSED_ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
Values = list[Any]
Handle = Callable[[Values, Values], int]


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _attention_flops(inputs: Values, outputs: Values) -> int:
    q, k, v = (_shape(value) for value in inputs[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _convolution_flops(inputs: Values, outputs: Values) -> int:
    """With padding="same" or "valid"."""
    out = _shape(outputs[0])
    return out[0] * prod(out[2:]) * prod(_shape(inputs[1]))


def _matmul_flops(inputs: Values, outputs: Values) -> int:
    a, b = _shape(inputs[0]), _shape(inputs[1])
    inner = a[-1]
    return prod(_shape(outputs[0])) * inner if len(b) > 1 else prod(a)


def _einsum_flops(inputs: Values, outputs: Values) -> int:
    """Two operands: the product of all distinct index sizes, exactly (fvcore rounds it to four digits)."""
    equation = inputs[0].toIValue().replace(" ", "")
    terms = equation.split("->")[0].split(",")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    if len(terms) != 2 or "." in equation:
        raise UncountedOperator(
            "aten::einsum", f"the equation {equation!r}", "two operands without '...'", "Write it as two products."
        )
    sizes = {
        axis: size for term, shape in zip(terms, shapes, strict=True) for axis, size in zip(term, shape, strict=True)
    }
    return prod(sizes.values())


def _native_attention_flops(inputs: Values, outputs: Values) -> int:
    query, key, embed = _shape(inputs[0]), _shape(inputs[1]), int(inputs[3].toIValue())
    batch, n, m = query[0], query[1], key[1]
    projections = batch * embed * embed * (2 * n + 2 * m)
    return projections + 2 * batch * n * m * embed


def _encoder_layer_flops(inputs: Values, outputs: Values) -> int:
    source, embed = _shape(inputs[0]), int(inputs[1].toIValue())
    batch, n = source[0], source[1]
    attention = 4 * batch * n * embed * embed + 2 * batch * n * n * embed
    feed_forward = next(
        2 * batch * n * prod(_shape(value))
        for value in inputs[8:]
        if value.isCompleteTensor() and len(_shape(value)) == 2 and embed in _shape(value)
    )
    return attention + feed_forward + 2 * 5 * batch * n * embed


Samples = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CostModel:
    """What every site costs, measured once; additive, so a plan's cost is `rest` plus the sum of its options.

    Args:
        base: multiply-adds of the original.
        hosts: {site path: multiply-adds of the attention there, or of all hidden units of the FFN}.
        units: {FFN site path: multiply-adds of one hidden unit}.
        shapes: {site path: shape of its input at batch 1}.
        samples: {site path: ((tokens, multiply-adds of the module there on so many), ...)} of sites that can run on
            fewer tokens: three points of a polynomial of degree two, or two where it is linear.
        beside: {site path: multiply-adds of what stands beside it in its residual line} of sites in a stream.
        heads: {site path: multiply-adds of one head} of attentions that can only lose whole ones.
    """

    base: int
    hosts: dict[str, int]
    units: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    samples: dict[str, Samples] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    @property
    def rest(self) -> int:
        """Multiply-adds outside all sites."""
        return self.outside(self.hosts)

    def outside(self, paths: Iterable[str]) -> int:
        """Multiply-adds outside these sites."""
        return self.base - sum(self.hosts[path] for path in paths)

    def total(self, choices: Mapping[str, Option]) -> int:
        """Multiply-adds of the network in which these options are chosen, {site path: option}."""
        return self.base + sum(option.flops - self.hosts.get(path, 0) for path, option in choices.items())

    @classmethod
    def measure(
        cls, model: nn.Module, seen: Observation, sites: Iterable[Site], stream: StreamSite | None = None
    ) -> CostModel:
        """Count the model as it is, and with every FFN one unit narrower and one head fewer, for the price of each."""
        sites = tuple(sites)
        counts = _counted(lift(model, sites).model, seen.inputs)
        fewer_units = {s.path: s.edits(range(s.hidden - 1)) for s in sites if isinstance(s, FFNSite)}
        able = {site.path: site.head_units for site in sites if isinstance(site, AttentionSite) and site.head_units}
        fewer_heads = {path: each.edits(path, range(each.heads - 1)) for path, each in able.items()}
        saved = _difference(model, seen, sites, counts, {**fewer_units, **fewer_heads})
        units, heads = ({path: saved[path] for path in edits} for edits in (fewer_units, fewer_heads))
        shapes = {}
        for site in sites:
            call = seen.once(site.path)
            assert call is not None and call.x is not None
            shapes[site.path] = call.x
        hosts = {s.path: s.hidden * units[s.path] if isinstance(s, FFNSite) else counts[s.path] for s in sites}
        samples, beside = _samples(model, seen, sites, counts), {} if stream is None else _beside(stream, counts)
        return cls(counts[""], hosts, units, shapes, samples, beside, heads)

    def mixer(self, site: AttentionSite, spec: MixerSpec, tokens: int | None = None) -> int:
        """Multiply-adds of a mixer at a site, on so many tokens (prefix tokens included), or on all."""
        if isinstance(spec, Attend):  # many of them, on many numbers of tokens
            assert site.merging is not None
            every = site.merging.tokens(site.merging.count)
            return self._sequences(site) * spec.flops(every if tokens is None else tokens)
        return _mixer_flops(spec, site.io, self.shapes[site.path])

    def ffn(self, site: FFNSite, kept: int) -> int:
        """Multiply-adds of `kept` hidden units of an FFN."""
        return kept * self.units[site.path]

    def instead(self, site: FFNSite, spec: Linear, tokens: int | None = None) -> int:
        """Multiply-adds of a linear layer in the place of a whole FFN on so many tokens (prefix tokens included), or on
        all; on the account of `hosts`, which does not know what an FFN takes beside its hidden units."""
        assert site.merging is not None
        every = site.merging.tokens(site.merging.count)
        saved = _at(self.samples[site.path], every) - self.hosts[site.path]
        return self._sequences(site) * spec.flops(every if tokens is None else tokens) - saved

    def on(self, site: Site, tokens: int, saved: int = 0) -> int:
        """Multiply-adds of a site whose host sees so many tokens, on the account of `hosts`.

        Args:
            site: one that can run on fewer tokens.
            tokens: how many, prefix tokens included.
            saved: hidden units that an FFN has lost.
        """
        assert site.merging is not None
        samples, all_tokens = self.samples[site.path], site.merging.tokens(site.merging.count)
        found = self.hosts[site.path] + _at(samples, tokens) - _at(samples, all_tokens)
        if saved:
            found -= _whole(Fraction(saved * self.units[site.path] * tokens, all_tokens))
        return found

    def merge(self, site: Site, keep: int) -> int:
        """Multiply-adds of comparing the tokens of a site until `keep` patches of a group are left."""
        assert site.merging is not None
        shape = self.shapes[site.path]
        channels = shape[1] if site.merging.arrangement == "b c h w" else shape[-1]
        return site.merging.spec(keep).flops * channels * self._sequences(site)

    def shortened(self, stream: StreamSite, drops: Iterable[Drop]) -> int:
        """Multiply-adds that merging through the network adds outside all sites: comparisons, and norms on fewer
        tokens (so it may be negative)."""
        drops, spec = tuple(drops), stream.stream
        channels, count, found = self.shapes[stream.blocks[0][1]][-1], spec.count, 0
        for drop in drops:
            found += spec.groups * channels * comparisons(count, drop.keep)
            count = drop.keep
        for path, tokens in stream.fewer(drops).items():
            found -= _whole(Fraction(self.beside[path] * (spec.tokens - tokens), spec.tokens))
        return found

    def _sequences(self, site: Site) -> int:
        """How many there are at batch 1: the windows, where they are folded into the batch."""
        assert site.merging is not None
        return self.shapes[site.path][1 if site.merging.arrangement == "n b c" else 0]


@cache  # blocks are alike
def _mixer_flops(spec: MixerSpec, io: IO, shape: tuple[int, ...]) -> int:
    return 0 if spec.kind in ("skip", "identity") else _counted(spec.build(io).eval(), torch.zeros(shape))[""]


def _difference(
    model: nn.Module,
    seen: Observation,
    sites: Iterable[Site],
    counts: Mapping[str, int],
    edits: Mapping[str, Iterable[Edit]],
) -> dict[str, int]:
    """{path: what the edits of that site, all made at once, take away from it}."""
    if not edits:
        return {}
    narrow = copy.deepcopy(model)
    apply_edits(narrow, [edit for each in edits.values() for edit in each])
    narrowed = _counted(lift(narrow, sites).model, seen.inputs)
    return {path: counts[path] - narrowed[path] for path in edits}


def _beside(stream: StreamSite, counts: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name, *paths in stream.blocks:
        for path, line in zip(paths, (stream.stream.attention, stream.stream.ffn), strict=True):
            found[path] = sum(counts[f"{stream.path}.{name}.{other}"] for other in (*line.before, *line.after))
    return found


def _samples(
    model: nn.Module, seen: Observation, sites: Iterable[Site], counts: Mapping[str, int]
) -> dict[str, Samples]:
    known: dict[Any, Samples] = {}
    found = {}
    for site in sites:
        call, merging = seen.once(site.path), site.merging
        if merging is None or call is None or call.x is None:
            continue
        module = model.get_submodule(site.path)
        key = (repr(module), call.x, repr(call.arguments), merging, counts[site.path])
        if key not in known:
            called, every = Called(module, call.arguments), merging.tokens(merging.count)
            fewer = (every - 1,) if isinstance(site, FFNSite) else (every - 1, every - 2)
            inputs = [(tokens, merging.input(call.x, tokens).to(seen.inputs)) for tokens in fewer]
            counted = [(tokens, _counted(called, value)[""]) for tokens, value in inputs]
            known[key] = ((every, counts[site.path]), *counted)
        found[site.path] = known[key]
    return found


def _at(samples: Samples, tokens: int) -> int:
    """The polynomial through the samples, exactly (Lagrange)."""
    value = Fraction(0)
    for here, flops in samples:
        others = [there for there, _ in samples if there != here]
        value += flops * Fraction(prod(tokens - there for there in others), prod(here - there for there in others))
    return _whole(value)


def _whole(value: Fraction) -> int:
    assert value.denominator == 1, "multiply-adds are whole numbers"
    return int(value)
