"""Image encoders of Hugging Face transformers, declared by class; transformers itself is never imported.

Their attentions return (output, weights); where heads and projections are called alike, one line serves many.
"""

from __future__ import annotations

from ..layouts import APART, Layout
from .declared import FFN, Attention, Declarations, Where, qkv, separate
from .geometry import Geometry, Place, Unknown, checked, grid_of, pair, prefix_of, tokens, unrolled, windows


def _prefix(place: Place) -> int:
    """Class and register tokens (DINOv2, DINOv3); else whatever leaves a grid."""
    registers = place.attribute("config.num_register_tokens")
    return 1 + registers if isinstance(registers, int) and registers else prefix_of(place, place.x[1])


def _hiera(place: Place) -> Layout:
    schedule = place.attribute("schedule")
    if not isinstance(schedule, dict):
        raise Unknown("its order of tokens is not known")
    strides, size = schedule[0]
    return unrolled(place, size, strides)


def _mobilevit(place: Place) -> Layout:
    """Pixels at the same place in every patch attend to each other: windows whose positions lie a patch apart."""
    patch = pair((place.attribute("patch_height"), place.attribute("patch_width")))
    if patch is None or len(place.x) != 3:
        raise Unknown("its patches are not known")
    rows, columns = grid_of(place, place.x[1])
    grid = (rows * patch[0], columns * patch[1])
    return checked(place, Layout(pattern="(b nh nw) (h w) c", grid=grid, window=(rows, columns), map=APART))


_SEQUENCE, _ALL = tokens(_prefix), tokens(prefix=0)
_WINDOWS = windows(shift="shift_size", rolled="padded")
_COUNT = "num_attention_heads"
_MASK = "attention_mask"  # keeps the windows of a rolled map apart
_SIZE = ("height", "width")
_V_O = separate("v_proj", "o_proj", _COUNT)


def _attention(
    layout: Geometry, heads: str | None = _COUNT, projections: Where | None = None, *ignored: str
) -> Attention:
    """One that returns (output, weights), and is told what others are to return."""
    return Attention(layout, heads, projections, ("output_hidden_states", "return_dict", *ignored), returns="tuple")


def _of(family: str, *names: str) -> tuple[str, ...]:
    return tuple(f"transformers.models.{family}.modeling_{family}.{name}" for name in names)


_ATTENTIONS = {
    _attention(_SEQUENCE, _COUNT, separate("v_proj", "o_proj", _COUNT, q="q_proj", k="k_proj", scale="scaling")): (
        *_of("vit", "ViTAttention"),
        *_of("deit", "DeiTAttention"),
        *_of("dinov2", "Dinov2Attention"),
        *_of("dinov2_with_registers", "Dinov2WithRegistersAttention"),
    ),
    _attention(_SEQUENCE, "num_heads", separate("v_proj", "out_proj", q="q_proj", k="k_proj", scale="scale")): (
        *_of("clip", "CLIPAttention"),
        *_of("siglip", "SiglipAttention"),
    ),
    _attention(_SEQUENCE, "num_heads", separate("v_proj", "o_proj"), "position_embeddings"): (
        _of("dinov3_vit", "DINOv3ViTAttention")
    ),
    _attention(_SEQUENCE, _COUNT, _V_O): _of("beit", "BeitAttention"),
    _attention(_WINDOWS, _COUNT, _V_O, _MASK): _of("swin", "SwinAttention"),
    _attention(_WINDOWS, f"self.{_COUNT}", None, _MASK): _of("swinv2", "Swinv2Attention"),
    _attention(_ALL, _COUNT, _V_O, *_SIZE): _of("segformer", "SegformerAttention"),
    _attention(tokens(), f"self.{_COUNT}", None, *_SIZE): _of("pvt", "PvtAttention"),
    _attention(_ALL, _COUNT, None, *_SIZE): _of("pvt_v2", "PvtV2SelfAttention"),
    _attention(windows("(b nh nw) h w c"), _COUNT, qkv(heads=_COUNT)): (
        _of("sam", "SamVisionAttention", "SamVisionSdpaAttention")
    ),
    _attention(_hiera, "num_heads"): _of("hiera", "HieraMaskUnitAttention"),
    Attention(_ALL, _COUNT): _of("levit", "LevitAttention"),
    Attention(_mobilevit, f"attention.{_COUNT}"): _of("mobilevit", "MobileViTAttention"),
}

_FFNS = {
    FFN("fc2"): (
        *_of("vit", "ViTMLP"),
        *_of("deit", "DeiTMLP"),
        *_of("beit", "BeitMLP"),
        *_of("dinov2", "Dinov2MLP"),
        *_of("dinov2_with_registers", "Dinov2WithRegistersMLP"),
        *_of("clip", "CLIPMLP"),
        *_of("siglip", "SiglipMLP"),
        *_of("swin", "SwinMLP"),
        *_of("segformer", "SegformerMixMLP"),
        *_of("hiera", "HieraMlp"),
    ),
    FFN("down_proj"): (
        *_of("dinov2", "Dinov2SwiGLUFFN"),
        *_of("dinov2_with_registers", "Dinov2WithRegistersSwiGLUFFN"),
        *_of("dinov3_vit", "DINOv3ViTMLP", "DINOv3ViTGatedMLP"),
    ),
    FFN("dense2"): (*_of("pvt", "PvtFFN"), *_of("pvt_v2", "PvtV2ConvFeedForwardNetwork")),
    FFN("linear_down.linear"): _of("levit", "LevitMLPLayer"),
    FFN("lin2"): _of("sam", "SamMLPBlock"),
    FFN("output.dense"): (*_of("swinv2", "Swinv2Layer"), *_of("mobilevit", "MobileViTTransformerLayer")),
}

_LEFT = {
    "its tokens are a shuffled part of the patches: load the weights into a ViTModel, whose attentions are these": (
        _of("vit_mae", "ViTMAEAttention")
    ),
    "it changes the size of the map": _of("levit", "LevitAttentionSubsample"),
    "a pooling head: it does not mix a map": _of("siglip", "SiglipMultiheadAttentionPoolingHead"),
    "attention without a softmax over positions, linear in their number already": (
        _of("mobilevitv2", "MobileViTV2LinearSelfAttention")
    ),
}

TRANSFORMERS = Declarations(
    "transformers",
    {name: kind for kind, names in _ATTENTIONS.items() for name in names},
    {name: kind for kind, names in _FFNS.items() for name in names},
    {name: reason for reason, names in _LEFT.items() for name in names},
)

__all__ = ["TRANSFORMERS"]
