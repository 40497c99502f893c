"""FFNs as linear layers beside narrower FFNs: what one costs in accuracy, and what it takes in FLOPs and in time.

    python -m benchmarks.ffns --data FOLDER --weights vit_tiny_patch16_224.safetensors

One FFN at a time, without any training. FOLDER holds the images of the league (`python -m benchmarks list` says which);
time is that of the module by itself, in turn with the FFN.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import msa2conv
from msa2conv.options import Option
from msa2conv.search.measure import distance, outputs
from msa2conv.stopwatch import interleaved
from msa2conv.transforms.lift import edited

from .common import write
from .harness.config import read_experiment
from .harness.runner import Stage

NETWORKS = {
    "DeiT micro": ("small", "deit_fashion"),
    "Swin micro": ("small", "swin_cifar"),
    "ViT-Ti": ("photos", "imagenet_photos"),
}
UNITS = (0.5, 0.35, 0.2, 0.1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="of the ViT-Ti")
    parser.add_argument("--images", type=int, default=128, help="that calibrate; as many others evaluate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, (tier, experiment) in NETWORKS.items():
        weights = args.weights if name == "ViT-Ti" else None
        stage = Stage.prepare(read_experiment(tier, experiment), args.data, weights)
        images, _ = stage.context(args.seed).calibration()
        rows += of_network(name, stage.parent, images[: args.images], stage.data.test.sample(args.images)[0], args.seed)
    write(
        "ffns",
        "python -m benchmarks.ffns --data FOLDER --weights vit_tiny_patch16_224.safetensors",
        args.seed,
        rows,
        f"""KL to the original on {args.images} images with one FFN changed, not trained; calibrated on as many others.
        Constant, pair, linear: the lever linear_ffn, a pair of layers a quarter as wide as the stream; the others: the
        lever ffn, so many of the hidden units kept. FLOPs and time: over the FFN's own, of the last in the network;
        medians of calls in turn.""",
    )


def of_network(name: str, model: nn.Module, images: Tensor, held_out: Tensor, seed: int) -> list[dict[str, Any]]:
    """A row for every FFN, and what the options of the last take."""
    seen, reference = msa2conv.inspect(model), outputs(model, held_out)
    calibration = msa2conv.calibrate(model, images, images=len(images), levers=("ffn", "linear_ffn"), seed=seed)
    rows: list[dict[str, Any]] = []
    for path, options in calibration.options().items():
        row: dict[str, Any] = {"network": name, "what": path}
        for column, option in columns(options).items():
            plan, tensors = msa2conv.make_plan(model, seen, {path: option})
            changed = msa2conv.apply(plan, model, tensors)
            row[column] = f"{distance(reference, outputs(changed, held_out), 'kl'):.4f}"
        rows.append(row)
        print(row, flush=True)
    path, options = list(calibration.options().items())[-1]
    chosen = columns(options)
    rows.append(
        {"network": name, "what": "FLOPs"}
        | {column: f"{o.flops / options[0].flops:.0%}" for column, o in chosen.items()}
    )
    for batch in (1, 32):
        taken = times(model, path, chosen, held_out[:1].expand(batch, *held_out.shape[1:]))
        rows.append({"network": name, "what": f"time, batch {batch}"} | taken)
        print(rows[-2:], flush=True)
    return rows


def columns(options: list[Option]) -> dict[str, Option]:
    """{what it is: option}."""
    nothing, pair, linear = (option for option in options if option.name.startswith(("0/", "linear")))
    slices = [option for option in options if option.name[0] in "123456789"]
    found = {"constant": nothing, "pair": pair, "linear": linear}
    for share in reversed(UNITS):
        wanted = share * options[0].flops
        found[f"{share:.0%} of the units"] = min(slices, key=lambda option: abs(option.flops - wanted))
    return found


def times(model: nn.Module, path: str, options: dict[str, Option], inputs: Tensor) -> dict[str, str]:
    """{what it is: time over the FFN's}."""
    caught: dict[str, Tensor] = {}
    places = {name: model.get_submodule(name) for name in (path, path.rpartition(".")[0])}
    handles = [
        module.register_forward_pre_hook(lambda _m, given, name=name: caught.update({name: given[0]}))
        for name, module in places.items()
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    host, block = places.values()
    modules = {"host": host} | {name: edited(host, path, each.edits, each.tensors()) for name, each in options.items()}
    calls = {name: partial(module, caught[path]) for name, module in modules.items()}
    # Before each, a copy of the block: what is timed lies in no cache, the FFN itself as little as what replaces it.
    ahead = partial(deepcopy(block), caught[path.rpartition(".")[0]])
    samples = interleaved(calls, inputs.device, 60, ahead=ahead, repeated=False)
    return {name: f"{samples.ratio(name, 'host'):.2f}" for name in options}


if __name__ == "__main__":
    main()
