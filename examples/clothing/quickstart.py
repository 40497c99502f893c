"""The main job on real data: a ViT-Ti that recognises clothing, converted to 0.7 of its FLOPs, before and after.

Run by `make quickstart`. Everything it reads is in the repository; results go to out/clothing/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

import msa2conv
from msa2conv.data import image_folder
from msa2conv.evaluate import Accuracy, evaluate, latency
from msa2conv.files import read_state_dict
from msa2conv.plan import Preprocessing, parameter_count

HERE = Path(__file__).parent
RELOAD = """
import sys, torch, msa2conv
hybrid, images = msa2conv.load(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(hybrid(images), sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flops", type=float, default=0.7)
    parser.add_argument("--distill-steps", type=int, default=0, help="also polish the hybrid, label-free")
    parser.add_argument("--sweep", action="store_true", help="also plan other budgets, out of the same calibration")
    parser.add_argument("--out", type=Path, default=Path("out/clothing"))
    args = parser.parse_args()
    console = Console()

    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    model.load_state_dict(read_state_dict(HERE / "vit_tiny_clothing10.safetensors"))
    model.eval()
    photos = image_folder(HERE / "test", (3, 224, 224), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9))

    console.rule("convert: no labels, no gradients; calibrated on photos shipped with msa2conv")
    plain = msa2conv.convert(model, args.flops, images=128)  # more are better, and take longer
    console.print(str(plain), highlight=False, soft_wrap=True)

    if args.sweep:
        console.rule("other budgets, out of the same calibration")
        console.print(str(msa2conv.sweep(model, calibration=plain.calibration)), highlight=False, soft_wrap=True)

    models = {"original": model, "hybrid": plain.model}
    last = plain
    if args.distill_steps:
        console.rule(f"the same plan, polished by {args.distill_steps} label-free distillation steps")
        last = msa2conv.convert(model, args.flops, calibration=plain.calibration, distill_steps=args.distill_steps)
        models["hybrid, polished"] = last.model
    saved = last.save(args.out)

    console.rule(f"{len(photos)} test photos that neither training nor calibration has seen")
    accuracy = {name: evaluate(m, photos, what=name) for name, m in models.items()}
    console.print(table(models, accuracy, last.plan.base.flops, last.plan.flops, photos[0][0][None]))

    images = torch.stack([photos[i][0] for i in range(0, len(photos), 12)])
    same = reloaded_in_fresh_process(saved, images, last.model)
    console.print(f"\n{saved}, reloaded in a fresh process: outputs {'equal bit for bit' if same else 'DIFFER'}")
    console.print(f"look at {args.out}/report.html; plan and model card lie beside it", highlight=False, soft_wrap=True)
    if not same:
        sys.exit(1)


def table(
    models: dict[str, torch.nn.Module], accuracy: dict[str, Accuracy], before: int, after: int, example: torch.Tensor
) -> Table:
    times = latency(models, example)
    result = Table()
    columns = ("", "top-1 %", "GFLOPs", "M params", "ms batch 1", "ratio", "ms batch 32", "ratio")
    for column in columns:
        result.add_column(column, justify="right")
    for name, model in models.items():
        flops = before if name == "original" else after
        cells = [name, f"{accuracy[name].percent:.1f}", f"{flops / 1e9:.3f}", f"{parameter_count(model) / 1e6:.2f}"]
        for each in times.values():
            cells += [f"{1e3 * each.timing(name).seconds:.1f}", f"{each.ratio(name, 'original'):.2f}"]
        result.add_row(*cells)
    return result


@torch.no_grad()
def reloaded_in_fresh_process(saved: Path, images: torch.Tensor, hybrid: torch.nn.Module) -> bool:
    given, got = saved.with_name("images.pt"), saved.with_name("outputs.pt")
    torch.save(images, given)
    subprocess.run([sys.executable, "-c", RELOAD, str(saved), str(given), str(got)], check=True)
    same = torch.equal(torch.load(got, weights_only=True), hybrid.eval()(images))
    given.unlink()
    got.unlink()
    return same


if __name__ == "__main__":
    main()
