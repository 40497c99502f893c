"""Attentions inside windows of a map. A convolution in their place runs on the whole map.

The masks that keep the windows of a rolled map apart are ignored: the Layout undoes the roll.
"""

from __future__ import annotations

import math
from typing import Any

from ...layouts import APART, Layout
from ...sites import Projections
from ..declared import Attention, qkv, separate
from ..geometry import Place, Unknown, checked, grid_of, pair, tokens, unrolled, windows

WINDOWED = "(b nh nw) (h w) c"


def mobilevit(place: Place) -> Layout:
    """Pixels at the same place in every patch attend to each other: windows whose positions lie a patch apart."""
    sides = pair(place.attribute("patch_size"))
    call = next(call for module, call in place.above if hasattr(module, "patch_area"))
    if sides is None or call is None or call.x is None:
        raise Unknown("its patches are not known")
    (patch_h, patch_w), (height, width) = sides, call.x[2:]
    window = (math.ceil(height / patch_h), math.ceil(width / patch_w))
    grid = (window[0] * patch_h, window[1] * patch_w)  # the block resizes its map to whole patches
    return checked(place, Layout(pattern=WINDOWED, grid=grid, window=window, map=APART))


def nest(place: Place) -> Layout:
    """Blocks of a level, in a dimension of their own."""
    if len(place.x) != 4:
        raise Unknown(f"its tokens {place.x} are not blocks of a map")
    _, blocks, positions, _ = place.x
    side = math.isqrt(positions)
    rows, columns = grid_of(place, blocks)
    grid = (rows * side, columns * side)
    return checked(place, Layout(pattern="b (nh nw) (h w) c", grid=grid, window=(side, side)))


def tnt(place: Place) -> Layout:
    """The pixels of every patch, or the patches."""
    if place.path.endswith("attn_out"):
        return tokens(prefix=1)(place)
    window = pair(place.attribute("pixel_embed.new_patch_size"))
    if window is None or len(place.x) != 3:
        raise Unknown("the size of its patches is not known")
    rows, columns = grid_of(place, place.x[0])
    grid = (rows * window[0], columns * window[1])
    return checked(place, Layout(pattern=WINDOWED, grid=grid, window=window))


def hiera(place: Place) -> Layout:
    """Tokens unrolled so that every pooling takes the maximum over the outermost axis."""
    size, schedule = place.attribute("unroll.size"), place.attribute("unroll.schedule")
    if size is None or schedule is None or len(size) != 2:
        raise Unknown("its order of tokens is not known")
    return unrolled(place, size, schedule)


def _gcvit(module: Any) -> Projections | None:
    return qkv()(module) or separate("qkv", half=True)(module)  # global queries come from outside


_SWIN = Attention(windows(shift="shift_size"), projections=qkv(), ignored=("mask",))

WINDOWS = {
    "timm.models.swin_transformer.WindowAttention": _SWIN,
    "timm.models.swin_transformer_v2.WindowAttention": _SWIN,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _SWIN,
    "timm.models.davit.WindowAttention": Attention(windows(around="b c h w"), projections=qkv(plain=True)),
    "timm.models.gcvit.WindowAttentionGlobal": Attention(windows(), projections=_gcvit, ignored=("q_global",)),
    "timm.models.tiny_vit.Attention": Attention(windows()),
    "timm.models.vision_transformer_sam.Attention": Attention(windows("(b nh nw) h w c"), projections=qkv()),
    "timm.models.hieradet_sam2.MultiScaleAttention": Attention(windows("(b nh nw) h w c"), projections=qkv()),
    "timm.models.maxxvit.AttentionCl": Attention(
        windows("(b nh nw) h w c", size="partition_size", dilated="partition_block"),
        projections=qkv(),
        ignored=("shared_rel_pos",),
    ),
    "timm.models.maxxvit.Attention2d": Attention(
        windows("(b nh nw) c h w", size="partition_size", around="b c h w", dilated="partition_block"),
        ignored=("shared_rel_pos",),
    ),
    "timm.models.nest.Attention": Attention(nest),
    "timm.models.tnt.Attention": Attention(tnt, projections=separate("v")),
    "timm.models.hiera.MaskUnitAttention": Attention(hiera, heads="heads"),
}
