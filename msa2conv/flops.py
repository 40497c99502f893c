"""FLOPs, counted once and exactly (the only importer of fvcore).

One multiply-add is one FLOP, as in fvcore, timm and every ViT-pruning paper; one forward pass at batch 1.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UncountedOperator
from .ops import TokenMixer

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
    return traced_flops(copy.deepcopy(model).eval(), inputs)


def traced_flops(model: nn.Module, inputs: Tensor) -> Counter[str]:
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
            "Add them to msa2conv.flops (ZERO_FLOPS, or a handle) rather than report a wrong figure.",
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
