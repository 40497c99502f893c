"""What a hybrid at 0.7 of the FLOPs takes where it runs: eager and in onnxruntime, one image at a time and in batches.

    python -m benchmarks.deploy --work deploy --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

Every network is one that `convert` makes, and the same after `streamline`; original, hybrid and streamlined take turns,
and so do the exported files. Without `--weights` the ViT-Ti has random weights like the others, and is calibrated on
noise. `--work` keeps calibrations, hybrids and exported files: interrupted, the same command continues, and rows that
were measured before with the same versions are skipped (`--again` measures them anew). In parts: `--models`,
`--batches`, `--levers`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from torch import Tensor, nn

import msa2conv
from msa2conv.api import versions
from msa2conv.errors import InfeasibleBudget
from msa2conv.levers import DEFAULT
from msa2conv.stopwatch import Samples, interleaved

from .common import RESULTS, packed_photos, split, vit_tiny, write
from .levers import ALL, calibrated, restricted

VIT, BUDGET = "vit_tiny_patch16_224", 0.7
NOISE = 32  # images that calibrate random weights: there is nothing to learn from them
MODELS = (VIT, "deit_small_patch16_224", "swin_tiny_patch4_window7_224")
LEVERS = {
    "the default": DEFAULT,
    "the default, in time": DEFAULT,
    "all": ALL,
    "nothing merged": ("mixer", "ffn", "thin_attention"),
}
COLUMNS = (
    "row",
    "model",
    "batch",
    "levers",
    "FLOPs",
    "at most",
    "eager",
    "streamlined",
    "onnxruntime",
    "rounds",
    "spread",
    "passes",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of the ViT-Ti")
    parser.add_argument("--photos", type=Path, help="an npz of JPEGs that calibrates the ViT-Ti with these weights")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--images", type=int, default=256, help="that calibrate")
    parser.add_argument("--rounds", type=int, default=31, help="at batch 1; a third of them in batches")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    done = set() if args.again else measured(args.seed)
    for name in args.models:
        wanted = [(batch, levers) for batch in args.batches for levers in args.levers]
        wanted = [pair for pair in wanted if f"{name} {pair[0]} {pair[1]}" not in done]
        if wanted:
            model, images = prepared(name, args)
            calibration = calibrated(model, images, args.work / f"{name}.safetensors", args.seed)
            for batch, levers in wanted:
                save(args, {"row": f"{name} {batch} {levers}", **row(name, model, calibration, batch, levers, args)})


def measured(seed: int) -> set[str]:
    """Rows that are there already, with the versions of today."""
    path = RESULTS / "deploy_cpu.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    same = known.get("seed") == seed and known.get("versions") == versions()
    return {row["row"] for row in known["rows"]} if same else set()


def prepared(name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor | None]:
    torch.manual_seed(args.seed)
    if name != VIT or args.weights is None:
        model = timm.create_model(name).eval()
        return model, torch.randn(NOISE, *model.pretrained_cfg["input_size"])
    images, _ = packed_photos(args.photos)
    return vit_tiny(args.weights), images[split(len(images), args.images, args.seed)[0]]


def bound(name: str, batch: int) -> float:
    """The share of the original's time that a hybrid of this budget should take at most."""
    return round(BUDGET + (0.05 if name != VIT else 0.15 if batch == 1 else 0.08), 2)


def row(
    name: str, model: nn.Module, calibration: msa2conv.Calibration, batch: int, levers: str, args: argparse.Namespace
) -> dict[str, Any]:
    found: dict[str, Any] = {"model": name, "batch": batch, "levers": levers, "at most": bound(name, batch)}
    in_time = levers.endswith("in time")
    stem = args.work / f"{name} {levers}{f' {batch}' if in_time else ''}"
    try:
        time = {"latency_target": bound(name, batch), "batch_size": batch, "timetable": args.work / "times.json"}
        hybrid = converted(model, calibration, levers, time if in_time else {}, stem)
    except InfeasibleBudget as error:
        return found | {"eager": f"refused: {error.expected}"}
    fast = msa2conv.streamline(hybrid)
    example = torch.zeros(1, *hybrid.plan.base.input_size).expand(batch, -1, -1, -1).contiguous()
    original = exported(model, args.work / f"{name}.onnx")
    rounds = args.rounds if batch == 1 else max(3, args.rounds // 3)
    networks = {"dense": model, "eager": hybrid.model.eval(), "streamlined": fast.model.eval()}
    eager = timed({name: partial(network, example) for name, network in networks.items()}, rounds)
    # Apart: the threads of either library keep a core busy for a while when they are done.
    files = {"dense": original, "hybrid": exported(fast, stem.with_name(f"{stem.name}.onnx"))}
    onnx = timed({name: session(file, example) for name, file in files.items()}, rounds)
    spreads = [samples.timing(call).spread for samples in (eager, onnx) for call in samples.seconds]
    return found | {
        "FLOPs": f"{hybrid.plan.flops / hybrid.plan.base.flops:.3f}",
        "eager": f"{eager.ratio('eager', 'dense'):.2f}",
        "streamlined": f"{eager.ratio('streamlined', 'dense'):.2f}",
        "onnxruntime": f"{onnx.ratio('hybrid', 'dense'):.2f}",
        "rounds": rounds,
        "spread": f"{max(spreads):.0%}",
        "passes": ", ".join(f"{name} {sites}" for name, sites in fast.report.streamlined.items()),
    }  # fmt: skip


def converted(
    model: nn.Module, calibration: msa2conv.Calibration, levers: str, time: dict[str, Any], stem: Path
) -> msa2conv.Conversion:
    """Under a budget of FLOPs, and of time if there is one; kept, and read if it is there."""
    if (stem / "model.safetensors").is_file():
        return msa2conv.Conversion.load(stem, model)
    own = restricted(calibration, LEVERS[levers])
    result = msa2conv.convert(model, BUDGET, levers=LEVERS[levers], calibration=own, **time)
    result.save(stem)
    return result


def exported(model: nn.Module | msa2conv.Conversion, path: Path) -> Path:
    if not path.is_file():
        msa2conv.export_onnx(model, path, dynamic_batch=True)
    return path


def session(path: Path, example: Tensor) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return partial(found.run, None, {found.get_inputs()[0].name: example.numpy()})


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> Samples:
    return interleaved(calls, torch.device("cpu"), rounds)


def save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    print(found, flush=True)
    write(
        "deploy_cpu",
        "python -m benchmarks.deploy --work deploy --weights vit_tiny_patch16_224.safetensors "
        "--photos imagenet_photos650.npz",
        args.seed,
        [{column: found.get(column, "") for column in COLUMNS}],
        f"""Time over the original's at {BUDGET:.0%} of its FLOPs, float32: medians of ratios of calls that took turns.
        At most: what a row must reach. Eager: as `convert` returns it; streamlined:
        after `msa2conv.streamline`, which onnxruntime runs too (over the exported original). The ViT-Ti
        is calibrated on {args.images} photos; the others have random weights, calibrated on {NOISE} images of noise, so
        that their plans are not those of a trained network.
        In time: `convert(0.7, latency_target=at most, batch_size=batch)`. Spread: the largest interquartile range over
        the median, how noisy the machine was.""",
        key="row",
        order=lambda row: (MODELS.index(row["model"]), row["batch"], list(LEVERS).index(row["levers"])),
    )


if __name__ == "__main__":
    main()
