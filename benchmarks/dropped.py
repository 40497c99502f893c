"""Ideas that did not earn their place: what they cost in accuracy beside what is there. Without any training.

    python -m benchmarks.dropped --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

depthwise: an attention keeps W_v and W_o; a 3x3 convolution of each channel, its mean over the patches, the class
token's value and a constant (twelve unknowns a channel, ridge in closed form) stand for its averaging. Class tokens
keep their exact attention. One block at a time, beside the candidates of the lever `mixer`, whose class tokens do the
same. A 5x5 convolution of one head's width stands beside them; other widths are in benchmarks/ablations.py.

width: channels of the residual stream go, the weakest first: by the norm of all weights that read or write them, or by
what occurs there (the second moment behind the norms times the norm of the weights that read it).

Scores are KL to the original on the photos that did not calibrate.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msa2conv
from msa2conv.search.measure import distance, outputs

from .common import packed_photos, split, vit_tiny, write

SIDE = 14


class Depthwise(nn.Module):
    """An attention of timm whose patches are averaged by `taps` [12, C] instead of by a softmax."""

    def __init__(self, host: Any, taps_PC: Tensor) -> None:
        super().__init__()
        self.host, self.taps_PC = host, taps_PC

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        exact_BNC, value_BNC = averaged(self.host, x)
        mixed_BNC = torch.einsum("bnpc,pc->bnc", features(value_BNC), self.taps_PC)
        return self.host.proj(torch.cat((exact_BNC[:, :1], mixed_BNC), 1))  # type: ignore[no-any-return]


def averaged(host: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the output projection reads, and the values [B, N, C]."""
    batch, count, dim = x.shape
    q, k, v = host.qkv(x).reshape(batch, count, 3, host.num_heads, -1).permute(2, 0, 3, 1, 4)
    found = F.scaled_dot_product_attention(q, k, v)
    return found.transpose(1, 2).reshape(batch, count, dim), v.transpose(1, 2).reshape(batch, count, dim)


def features(value_BNC: Tensor) -> Tensor:
    """Of every patch and channel: nine neighbours, the mean of the patches, the class token, one -> [B, N, 12, C]."""
    batch, _, dim = value_BNC.shape
    patches = value_BNC[:, 1:]
    maps = patches.transpose(1, 2).reshape(batch, dim, SIDE, SIDE)
    near = F.unfold(maps, 3, padding=1).reshape(batch, dim, 9, -1).permute(0, 3, 2, 1)
    rest = (patches.mean(1), value_BNC[:, 0], torch.ones_like(value_BNC[:, 0]))
    return torch.cat((near, *(part[:, None, None].expand(-1, near.shape[1], 1, -1) for part in rest)), 2)


@torch.no_grad()
def fitted(host: Any, inputs: Tensor, ridge: float = 1e-3) -> Depthwise:
    """The ridge regression of every channel."""
    grams, crosses = 0.0, 0.0
    for x in inputs.split(16):
        exact_BNC, value_BNC = averaged(host, x)
        found = features(value_BNC).double()
        grams = grams + torch.einsum("bnpc,bnqc->cpq", found, found)
        crosses = crosses + torch.einsum("bnpc,bnc->cp", found, exact_BNC[:, 1:].double())
    floor = ridge * grams.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(12)  # type: ignore[attr-defined]
    return Depthwise(host, torch.linalg.solve(grams + floor, crosses).T.float())


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


def narrowed(model: Any, share: float, photos: Tensor | None) -> nn.Module:
    """Without the weakest channels of the residual stream."""
    norms = [norm for block in model.blocks for norm in (block.norm1, block.norm2)] + [model.norm]
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
    narrow: Any = copy.deepcopy(model)
    for block in narrow.blocks:
        block.norm1, block.norm2 = Narrow(block.norm1, kept_C), Narrow(block.norm2, kept_C)
    narrow.norm = Narrow(narrow.norm, kept_C)
    return narrow  # type: ignore[no-any-return]


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
    mixer = msa2conv.Mixer(ops=("skip", "constant", "global", "conv1x1", "conv3x3", "conv5x5"))
    every = msa2conv.calibrate(model, photos, levers=mixer, seed=args.seed).options()
    seen = msa2conv.inspect(model)
    rows: list[dict[str, Any]] = []
    for index, block in enumerate(model.blocks):
        path, host = f"blocks.{index}.attn", block.attn
        inputs: list[Tensor] = []
        handle = host.register_forward_pre_hook(lambda _m, a, inputs=inputs: inputs.append(a[0]))
        outputs(model, photos)
        handle.remove()
        row: dict[str, Any] = {"what": f"attention {index}"}
        for option in every[path]:
            if option.edits:
                plan, tensors = msa2conv.make_plan(model, seen, {path: option})
                row[option.name] = kl(msa2conv.apply(plan, model, tensors), held_out, reference)
        block.attn = fitted(host, torch.cat(inputs))
        row["depthwise on V"] = kl(model, held_out, reference)
        block.attn = host
        rows.append(row)
        print(row, flush=True)
    for share in (0.95, 0.9, 0.8):
        row = {"what": f"{share:.0%} of the width"}
        row["by weights"] = kl(narrowed(model, share, None), held_out, reference)
        row["by activations"] = kl(narrowed(model, share, photos), held_out, reference)
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
