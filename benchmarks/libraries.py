"""Backbones of transformers and torchvision: one conversion a family, of a small configuration with random weights.

    python -m benchmarks.libraries                                # all
    python -m benchmarks.libraries --modules transformers.Swin    # some; rows merge

As `python -m benchmarks.coverage` does for timm. Of torchvision's larger models only the claims are made, on the meta
device. Writes results/libraries.json; `python -m benchmarks.table` puts it into docs/BACKBONES.md.
"""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from .common import write
from .coverage import NOTE, claimed, convert_one, in_its_own_process

_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}  # DeiT-Ti
_SMALL = {"hidden_size": 384, "num_attention_heads": 6}
TRANSFORMERS: dict[str, dict[str, Any]] = {  # {family: arguments of its config, beside the defaults}
    "ViT": _TINY,
    "DeiT": _TINY,
    "Beit": {},
    "Dinov2": _SMALL,
    "Dinov2WithRegisters": _SMALL,
    "DINOv3ViT": {},
    "SiglipVision": {},
    "CLIPVision": {"num_hidden_layers": 4},
    "Swin": {},
    "Swinv2": {},
    "Segformer": {"image_size": 224},
    "Pvt": {},
    "PvtV2": {"image_size": 224},
    "MobileViT": {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320]},  # XXS
    "MobileViTV2": {},
    "Levit": {},
    "SamVision": {"image_size": 512},
    "ViTMAE": _TINY,
    "Hiera": {},
}
TORCHVISION = {
    "vit": ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
    "swin": ("swin_t", "swin_s", "swin_b"),
    "swin_v2": ("swin_v2_t", "swin_v2_s", "swin_v2_b"),
    "maxvit": ("maxvit_t",),
}
MODULES = (*(f"transformers.{family}" for family in TRANSFORMERS), *(f"torchvision.{kind}" for kind in TORCHVISION))


def names(module: str) -> tuple[str, ...]:
    """Models of a module, the smallest first."""
    library, _, family = module.partition(".")
    return TORCHVISION[family] if library == "torchvision" else (f"{family}Model",)


def build(module: str, name: str) -> nn.Module:
    """With random weights, in eval mode."""
    library, _, family = module.partition(".")
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(name, weights=None).eval()
    import transformers

    config = getattr(transformers, f"{family}Config")(**TRANSFORMERS[family])
    return getattr(transformers, name)(config).eval()


def _without_weights(module: str, name: str) -> nn.Module:
    with torch.device("meta"):
        return build(module, name)


def row_of(module: str, name: str, seed: int) -> dict[str, Any]:
    """A conversion of the smallest model, claims of the others."""
    library = module.partition(".")[0]
    if name == names(module)[0]:
        return in_its_own_process("benchmarks.libraries", module, name, seed) | {"version": version(library)}
    found = claimed(name, partial(_without_weights, module, name))
    counts = {"attentions": found["attentions"], "FFNs": found["ffns"]}
    verdict = "claimed" if found["attentions"] else "fails"
    return {"module": module, "model": name, **counts, "verdict": verdict, "reason": found["reason"]} | {
        "version": version(library)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=MODULES, choices=MODULES, metavar="MODULE")
    parser.add_argument("--one", nargs=2, metavar=("MODULE", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        print(json.dumps(convert_one(*args.one, args.seed, partial(build, *args.one))))
        return
    for module in args.modules:
        rows = [row_of(module, name, args.seed) for name in names(module)]
        print("\n".join(map(json.dumps, rows)), flush=True)
        write("libraries", "python -m benchmarks.libraries", args.seed, rows, NOTE, key="module")


if __name__ == "__main__":
    main()
