"""Dense prediction: a label for every patch of a photo, before and after conversion.

    python examples/dense/label_map.py

The classifier of `examples/clothing` is applied to every patch token instead of the class token alone, a class
activation map (Zhou et al., CVPR 2016, for ViTs): a model of one's own, with timm's inside, that returns two things.
The grid of tokens is kept by the conversion: the hybrid's map has the original's shape and is compared place by place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import msa2conv
from msa2conv.data import image_folder
from msa2conv.files import read_state_dict
from msa2conv.plan import Preprocessing

CLOTHING = Path(__file__).parents[1] / "clothing"


class LabelMap(nn.Module):
    """Photos [B, 3, 224, 224] -> {"photo": logits [B, 10], "map": logits [B, 10, 14, 14]}."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.vit.forward_features(images)
        patches = self.vit.head(tokens[:, self.vit.num_prefix_tokens :])
        grid = self.vit.patch_embed.dynamic_feat_size(images.shape[-2:])
        return {"photo": self.vit.head(tokens[:, 0]), "map": patches.transpose(1, 2).unflatten(2, grid)}


def trained() -> LabelMap:
    """With the weights of the clothing example."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    vit.load_state_dict(read_state_dict(CLOTHING / "vit_tiny_clothing10.safetensors"))
    return LabelMap(vit).eval()


def photos(first: int) -> Tensor:
    """Every third test photo of the clothing example, from the `first` on, [124, 3, 224, 224]."""
    prepared = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
    folder = image_folder(CLOTHING / "test", (3, 224, 224), prepared)
    return torch.stack([folder[index][0] for index in range(first, len(folder), 3)])


@torch.no_grad()
def agreement(first: nn.Module, second: nn.Module, images: Tensor) -> dict[str, float]:
    """Share of places, and of photos, to which both models give the same label."""
    same = {"map": 0.0, "photo": 0.0}
    for batch in torch.split(images, 32):
        one, other = first(batch), second(batch)
        for name in same:
            assert one[name].shape == other[name].shape
            same[name] += float((one[name].argmax(1) == other[name].argmax(1)).float().mean()) * len(batch)
    return {name: value / len(images) for name, value in same.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=0.6)
    parser.add_argument("--levers", nargs="+", help="what may change; all by default")
    args = parser.parse_args()
    model, images, others = trained(), photos(0), photos(1)
    ways = {"the map": lambda output: output["map"], "the photo's label": lambda output: output["photo"], "both": None}
    print(
        f"the same label as the original, at {args.flops:.0%} of the FLOPs, without training, on {len(images)} photos"
    )
    for scored, output_fn in ways.items():
        result = msa2conv.convert(
            model, args.flops, data=others, example_inputs=others[:1], levers=args.levers or "all", output_fn=output_fn
        )
        same = agreement(model, result.model, images)
        print(f"scored by {scored:<17}  places {same['map']:.1%}   photos {same['photo']:.1%}")
    print(f"map: {tuple(result.model(images[:1])['map'].shape)}\n\n{result.plan}")


if __name__ == "__main__":
    main()
