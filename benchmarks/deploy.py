"""What a hybrid at 0.7 of the FLOPs takes where it runs, one image at a time and in batches.

    python -m benchmarks.deploy --work deploy --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz
    python -m benchmarks.deploy --work deploy --device cuda ...     # bfloat16, eager and compiled

Every network is one that `convert` makes, and the same after `streamline`; original, hybrid and streamlined take turns,
and so do the exported files in onnxruntime on a CPU, and the compiled networks on a GPU. Without `--weights` the ViT-Ti
has random weights like the others, and is calibrated on noise. `--work` keeps calibrations, hybrids and exported files:
interrupted, the same command continues, and rows that were measured before with the same versions are skipped
(`--again` measures them anew). In parts: `--models`, `--batches`, `--levers`.
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
from msa2conv.errors import ExportFailed, InfeasibleBudget
from msa2conv.levers import DEFAULT
from msa2conv.stopwatch import Samples, interleaved

from .common import RESULTS, device_name, packed_photos, split, vit_tiny, write
from .levers import INSIDE, UNMERGED, VARIANTS, calibrated, restricted

VIT, BUDGET = "vit_tiny_patch16_224", 0.7
NOISE = 32  # images that calibrate random weights: there is nothing to learn from them
MODELS = (VIT, "deit_small_patch16_224", "swin_tiny_patch4_window7_224")
LEVERS = {
    "the default": DEFAULT,
    "the default, in time": DEFAULT,
    f"{INSIDE}, in time": VARIANTS[INSIDE],
    "default but merge_in_site": VARIANTS["default but merge_in_site"],
    "nothing merged": VARIANTS[UNMERGED],
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
BATCHES = {"cpu": (1, 32), "cuda": (1, 64, 256)}
COLUMNS = ("row", "model", "batch", "levers", "FLOPs", "at most", "eager", "streamlined")
SECOND = {
    "cpu": (
        "onnxruntime",
        "onnxruntime runs the latter too (over the exported original; refused: random weights, merges at ties).",
    ),
    "cuda": ("compiled", "compiled: the latter by `torch.compile` with CUDA graphs (over the compiled original)."),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of the ViT-Ti")
    parser.add_argument("--photos", type=Path, help="an npz of JPEGs that calibrates the ViT-Ti with these weights")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--device", choices=BATCHES, default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", help="1 and 32 on a CPU; 1, 64 and 256 on a GPU")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--compiled", nargs="*", choices=LEVERS, help="on a GPU: of which levers; all by default")
    parser.add_argument("--images", type=int, default=256, help="that calibrate")
    parser.add_argument("--rounds", type=int, default=31, help="at batch 1; a third of them in batches")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    done = set() if args.again else measured(args)
    for name in args.models:
        wanted = [(batch, levers) for batch in args.batches or BATCHES[args.device] for levers in args.levers]
        wanted = [pair for pair in wanted if f"{name} {pair[0]} {pair[1]}" not in done]
        if wanted:
            model, images = prepared(name, args)
            calibration = calibrated(model, images, args.work / f"{name}.safetensors", args.seed)
            for batch, levers in wanted:
                save(args, {"row": f"{name} {batch} {levers}", **row(name, model, calibration, batch, levers, args)})


def measured(args: argparse.Namespace) -> set[str]:
    """Rows that are there already, from this device and with the versions of today."""
    path = RESULTS / f"deploy_{args.device}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    today = {"seed": args.seed, "versions": versions(), "device": device_name(args.device)}
    same = all(known.get(part) == value for part, value in today.items())
    return {row["row"] for row in known["rows"]} if same else set()


def prepared(name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor | None]:
    torch.manual_seed(args.seed)
    if name != VIT or args.weights is None:
        model = timm.create_model(name).eval()
        return placed(model, args), torch.randn(NOISE, *model.pretrained_cfg["input_size"])
    images, _ = packed_photos(args.photos)
    return placed(vit_tiny(args.weights), args), images[split(len(images), args.images, args.seed)[0]]


def placed(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    return model.to(args.device, DTYPES[args.device])


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
    size = (batch, *hybrid.plan.base.input_size)
    example = torch.randn(size, generator=torch.Generator().manual_seed(args.seed)).to(args.device, DTYPES[args.device])
    rounds = args.rounds if batch == 1 or args.device == "cuda" else max(3, args.rounds // 3)
    networks = {"dense": model, "eager": hybrid.model.eval(), "streamlined": fast.model.eval()}
    samples = [timed({name: partial(network, example) for name, network in networks.items()}, rounds, args)]
    found |= {of: f"{samples[0].ratio(of, 'dense'):.2f}" for of in ("eager", "streamlined")}
    # Apart: the threads of either library keep a core busy for a while when they are done.
    calls: dict[str, Callable[[], Any]] = {}
    if args.device == "cpu":
        files = {"dense": exported(model, args.work / f"{name}.onnx")}
        try:
            files["hybrid"] = exported(fast, stem.with_name(f"{stem.name}.onnx"))
            calls = {name: session(file, example) for name, file in files.items()}
        except ExportFailed as error:  # of random weights, tokens are so much alike that rounding decides who merges
            print(error, flush=True)
            found[SECOND[args.device][0]] = "refused"
    elif args.compiled is None or levers in args.compiled:
        torch.compiler.reset()  # PyTorch keeps few compiled versions of a forward, and every network brings its own
        calls = {name: compiled(network, example) for name, network in (("dense", model), ("hybrid", fast.model))}
    if calls:
        samples.append(timed(calls, rounds, args))
        found[SECOND[args.device][0]] = f"{samples[1].ratio('hybrid', 'dense'):.2f}"
    return found | {
        "FLOPs": f"{hybrid.plan.flops / hybrid.plan.base.flops:.3f}",
        "rounds": rounds,
        "spread": f"{max(each.timing(call).spread for each in samples for call in each.seconds):.0%}",
        "passes": ", ".join(f"{name} {sites}" for name, sites in fast.report.streamlined.items()),
    }


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


def compiled(network: nn.Module, example: Tensor) -> Callable[[], Any]:
    """With CUDA graphs, for one shape."""
    found = torch.compile(network, mode="reduce-overhead", dynamic=False)

    def call() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        found(example)

    return call


def timed(calls: dict[str, Callable[[], Any]], rounds: int, args: argparse.Namespace) -> Samples:
    return interleaved(calls, torch.device(args.device), rounds)


def save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    print(found, flush=True)
    dtype, device = str(DTYPES[args.device]).removeprefix("torch."), args.device
    write(
        f"deploy_{device}",
        f"python -m benchmarks.deploy --work deploy --weights vit_tiny_patch16_224.safetensors "
        f"--photos imagenet_photos650.npz{' --device cuda' if device == 'cuda' else ''}",
        args.seed,
        [{column: found.get(column, "") for column in (*COLUMNS, SECOND[device][0], "rounds", "spread", "passes")}],
        f"""Time over the original's at {BUDGET:.0%} of its FLOPs, {dtype}: medians of ratios of calls that took turns.
        At most: what a row must reach. Eager: as `convert` returns it; streamlined:
        after `msa2conv.streamline`; {SECOND[device][1]} The ViT-Ti
        is calibrated on {args.images} photos; the others have random weights, calibrated on {NOISE} images of noise, so
        that their plans are not those of a trained network.
        In time: `convert(0.7, latency_target=at most, batch_size=batch)`, timed eager. Spread: the largest
        interquartile range over the median, how noisy the machine was.""",
        key="row",
        order=lambda row: (MODELS.index(row["model"]), row["batch"], list(LEVERS).index(row["levers"])),
        device=device,
    )


if __name__ == "__main__":
    main()
