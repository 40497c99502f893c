"""Ideas beside what is there: what they cost in accuracy, without any training. Most did not earn their place.

    python -m benchmarks.dropped --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

attention: every candidate of the lever `mixer`, also those that are not in use by default, one block at a time. Other
widths of bottlenecks are in benchmarks/ablations.py.

width: channels of the residual stream go, the weakest first: by the norm of all weights that read or write them, or by
what occurs there (the second moment behind the norms times the norm of the weights that read it). Or directions instead
of channels: the stream is rotated into its principal components and the last of them go (SliceGPT: Ashkboos et al.,
ICLR 2024, with one rotation for all blocks, which adds no multiply-adds).

Scores are KL to the original on the photos that did not calibrate.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msa2conv
from msa2conv.search.measure import distance, outputs

from .common import packed_photos, split, vit_tiny, write

OPS = ("skip", "constant", "global", "conv1x1", "conv3x3", "conv5x5", "depthwise3x3", "depthwise5x5", "depthwise7x7")


class Narrow(nn.Module):
    """A LayerNorm over some of the channels; the others are gone."""

    def __init__(self, norm: nn.LayerNorm, kept_C: Tensor) -> None:
        super().__init__()
        self.norm, self.kept_C = norm, kept_C

    def forward(self, x: Tensor) -> Tensor:
        kept, norm = self.kept_C, self.norm
        out = torch.zeros_like(x)
        out[..., kept] = F.layer_norm(x[..., kept], (int(kept.sum()),), norm.weight[kept], norm.bias[kept], norm.eps)
        return out


class Projected(nn.Module):
    """A LayerNorm over some directions of the stream; what lies across them is gone."""

    def __init__(self, norm: nn.LayerNorm, kept_CC: Tensor) -> None:
        super().__init__()
        self.norm, self.kept_CC = norm, kept_CC

    def forward(self, x: Tensor) -> Tensor:
        return self.norm((x - x.mean(-1, keepdim=True)) @ self.kept_CC)  # type: ignore[no-any-return]


def rotated(model: Any, share: float, photos: Tensor) -> nn.Module:
    """Without the last principal components of the residual stream, as the norms see it."""
    moments_CC = torch.zeros(model.embed_dim, model.embed_dim)

    def see(norm: nn.LayerNorm, args: tuple[Tensor, ...], _out: Tensor) -> None:
        x = F.layer_norm(args[0], norm.normalized_shape, eps=norm.eps).flatten(0, -2)
        moments_CC.addmm_(x.T, x, alpha=1 / len(x))

    handles = [norm.register_forward_hook(see) for norm in norms_of(model)]
    model(photos)
    for handle in handles:
        handle.remove()
    leading = torch.linalg.eigh(moments_CC).eigenvectors[:, -round(share * model.embed_dim) :]
    kept_CC = leading @ leading.T
    return with_norms(model, lambda norm: Projected(norm, kept_CC))


def with_norms(model: Any, wrapped: Callable[[nn.LayerNorm], nn.Module]) -> nn.Module:
    """A copy in which another module stands where the residual stream is read."""
    found: Any = copy.deepcopy(model)
    for block in found.blocks:
        block.norm1, block.norm2 = wrapped(block.norm1), wrapped(block.norm2)
    found.norm = wrapped(found.norm)
    return found  # type: ignore[no-any-return]


def norms_of(model: Any) -> list[nn.LayerNorm]:
    return [norm for block in model.blocks for norm in (block.norm1, block.norm2)] + [model.norm]


def narrowed(model: Any, share: float, photos: Tensor | None) -> nn.Module:
    """Without the weakest channels of the residual stream."""
    norms = norms_of(model)
    readers = [layer for block in model.blocks for layer in (block.attn.qkv, block.mlp.fc1)] + [model.head]
    writers = [layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    strength_C = torch.zeros(model.embed_dim)
    for norm, layer in zip(norms, readers, strict=True):
        heard_C = layer.weight.square().sum(0)
        if photos is None:
            strength_C += heard_C * norm.weight.square()
        else:
            seen: list[Tensor] = []
            handle = norm.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.square().mean((0, 1))))
            model(photos)
            handle.remove()
            strength_C += heard_C * seen[0]
    if photos is None:
        strength_C += sum(layer.weight.square().sum(1) for layer in writers)
    kept_C = torch.zeros(model.embed_dim, dtype=torch.bool)
    kept_C[strength_C.topk(round(share * model.embed_dim)).indices] = True
    return with_norms(model, lambda norm: Narrow(norm, kept_C))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64, help="photos that calibrate; as many others evaluate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model: Any = vit_tiny(args.weights)
    images, _ = packed_photos(args.photos)
    fit, rest = split(len(images), args.images, args.seed)
    photos, held_out = images[fit], images[rest[: args.images]]
    reference = outputs(model, held_out)
    every = msa2conv.calibrate(model, photos, levers=msa2conv.Mixer(ops=OPS), seed=args.seed).options()
    seen = msa2conv.inspect(model)
    rows: list[dict[str, Any]] = []
    for index in range(len(model.blocks)):
        path, row = f"blocks.{index}.attn", {"what": f"attention {index}"}
        for option in every[path]:
            if option.edits:
                plan, tensors = msa2conv.make_plan(model, seen, {path: option})
                row[option.name] = kl(msa2conv.apply(plan, model, tensors), held_out, reference)
        rows.append(row)
        print(row, flush=True)
    saved = {option.name: option.flops / seen.costs.hosts[option.site] for option in every["blocks.0.attn"]}
    rows.append({"what": "FLOPs / attention"} | {name: f"{saved[name]:.0%}" for name in OPS if name in saved})
    for share in (0.95, 0.9, 0.8):
        row = {"what": f"{share:.0%} of the width"}
        row["by weights"] = kl(narrowed(model, share, None), held_out, reference)
        row["by activations"] = kl(narrowed(model, share, photos), held_out, reference)
        row["by components"] = kl(rotated(model, share, photos), held_out, reference)
        rows.append(row)
        print(row, flush=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    write(
        "dropped",
        "python -m benchmarks.dropped --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz",
        args.seed,
        rows,
        f"""KL to the original (ViT-Ti/16, timm augreg_in21k_ft_in1k) on {args.images} ImageNet validation photos,
        fitted on {args.images} others, not trained; one block at a time, and the whole width.""",
    )


def kl(model: nn.Module, images: Tensor, reference: Tensor) -> float:
    return round(distance(reference, outputs(model.eval(), images), "kl"), 4)


if __name__ == "__main__":
    main()
