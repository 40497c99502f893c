"""Does it work on *my* model? Every timm model with attention is looked at; the smallest of every module is converted.

    python -m benchmarks.coverage                       # all: claims of every model, then one conversion a module
    python -m benchmarks.coverage --modules davit pit   # some; rows merge
    python -m benchmarks.coverage --claims-only

Claims are made on the meta device, from one forward pass without weights. A conversion starts from random weights and
a few random images: it says whether the surgery is right, not how accurate the result is. It aims at 0.85 of the FLOPs
(or the nearest that can be reached); the laws are checked by `convert`, saving and loading here, and that tokens lie
where the Layout says by `displaced`. Writes results/coverage.json and results/claims.json; `python -m benchmarks.table`
then writes docs/BACKBONES.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import msa2conv
from msa2conv.adapters.base import default_adapters, find_sites
from msa2conv.adapters.build import example_size
from msa2conv.adapters.trial import displaced
from msa2conv.errors import Msa2ConvError, NoSitesFound
from msa2conv.levers import FFN, Mixer
from msa2conv.observation import observe
from msa2conv.search.measure import tensor_of
from msa2conv.sites import AttentionSite, Claims
from msa2conv.workbench import working_copy

from .common import write

TARGET, IMAGES, LARGE = 0.85, 8, 12e9
SIZE = (3, 224, 224)  # of models that do not say
MODULES = tuple(
    """
    beit byoanet byobnet cait coat convit cpubone crossvit csatv2 davit deepseek_vit deit edgenext efficientformer
    efficientformer_v2 efficientvit_msra eva fastvit gcvit gemma4_vit hiera hieradet_sam2 iformer levit lowformer
    maxxvit metaformer mobilenetv3 mobilenetv5 mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 qwen3_vit shvit
    swiftformer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins visformer
    vision_transformer vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo xcit
    """.split()  # noqa: SIM905
)
NOTE = """
The smallest model of every module with attention, random weights, converted at 0.85 of its FLOPs or the nearest that
can be reached, from 8 random images. It says whether the surgery is right, not how accurate the result is. Kept: FLOPs
of the hybrid against the original. Lifted, lowered: the largest difference of an
output that lifting, and lowering, made. Tokens off by: with every
attention silenced, how far the centre of the tokens that hear a change of the image lies from its place, at most, as
a share of the side; large only where other global layers are left (class, channel or strided attention).
"""
_SHAPE = r" \([0-9, ]+\)"


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@cache
def claims_of(name: str) -> dict[str, Any]:
    """What is found in a timm model, without weights; a row of results/claims.json."""
    return claimed(name, lambda: on_meta(name))


def claimed(name: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
    """What is found in a model that `build` makes on the meta device."""
    row: dict[str, Any] = {"model": name, "attentions": 0, "ffns": 0, "refused": {}, "reason": ""}
    started = time.perf_counter()
    try:
        model = build()
        size = example_size(model) or SIZE
        seen = observe(model, torch.zeros(1, *size, device="meta"))
        try:
            found = find_sites(model, seen)
            row |= {"attentions": len(found.attentions), "ffns": len(found.ffns)}
        except NoSitesFound as error:
            found = Claims.of(item for adapter in default_adapters() for item in adapter.claims(model, seen).refusals)
            row["reason"] = "" if found.refusals else error.found
        kinds = Counter(f"{item.kind}: {re.sub(_SHAPE, '', item.reason)}" for item in found.refusals)
        row["refused"] = {what: times for what, times in kinds.items() if "left dense" not in what or found.sites}
    except (Msa2ConvError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def convert_one(module: str, name: str, seed: int, build: Callable[[], nn.Module] | None = None) -> dict[str, Any]:
    """Convert one model and check the result; a row of results/coverage.json."""
    torch.manual_seed(seed)
    model = (build or (lambda: timm.create_model(name)))().eval()
    size = example_size(model) or SIZE
    row: dict[str, Any] = {"module": module, "model": name}
    example = {"example_inputs": torch.randn(1, *size, generator=torch.Generator().manual_seed(seed))}
    try:
        seen = msa2conv.inspect(model, **example)
    except NoSitesFound as error:
        return row | {"verdict": "nothing to convert", "reason": error.found}
    row |= {"GFLOPs": round(seen.costs.base / 1e9, 2), "attention": f"{seen.share(AttentionSite):.0%}"}
    row |= {"attentions": len(seen.claims.attentions), "FFNs": len(seen.claims.ffns)}
    levers = (Mixer(), FFN()) if seen.costs.base < LARGE else (Mixer(ops=("skip", "conv1x1"), rank=0.25),)
    seen = msa2conv.inspect(model, levers=levers, **example)
    target = max(TARGET, round(seen.floor / seen.costs.base + 0.02, 3))
    started = time.perf_counter()
    images = torch.randn(IMAGES, *size, generator=torch.Generator().manual_seed(seed))
    result = msa2conv.convert(model, target, data=images, levers=levers, seed=seed, progress=False, **example)
    took = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        again = msa2conv.load(result.save(Path(folder) / "hybrid.safetensors"), model)
        x = images[:2]
        same = torch.equal(tensor_of(again(x)), tensor_of(result.model(x)))
    places = displaced(working_copy(model), seen.claims.attentions, images[:1])
    tried = [len([o for o in options if o.edits]) for path, options in result.calibration.options().items()]
    changed = [path for path in result.plan.choices if result.plan.choices[path] != "attention"]
    row |= {
        "target": target,
        "kept": f"{result.plan.flops / result.plan.base.flops:.4f}",
        "options": sum(tried),
        "changed sites": len(changed),
        "lifted, lowered": f"{result.report.laws['lifting']:.0e}, {result.report.laws['lowering']:.0e}",
        "reloaded": "same bits" if same else "differs",
        "tokens off by": f"{max(places.values(), default=0):.0%}",
        "seconds": round(took),
    }
    replaced = [o for site in seen.claims.attentions for o in result.calibration.options()[site.path] if o.edits]
    right = result.plan.flops <= target * result.plan.base.flops and same
    if not replaced and not seen.claims.attentions:
        left = ", ".join(sorted({item.kind for item in seen.claims.refusals}))
        return row | {"verdict": "FFN only" if right else "fails", "reason": f"left as they are: {left}"}
    return row | {"verdict": "works" if replaced and right else "fails", "reason": ""}


def of_all_models(modules: list[str]) -> Iterator[tuple[str, str]]:
    for module in modules:
        for name in timm.list_models(module=module):
            yield module, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=MODULES, choices=MODULES, metavar="MODULE")
    parser.add_argument("--claims-only", action="store_true")
    parser.add_argument("--conversions-only", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("MODULE", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        print(json.dumps(convert_one(*args.one, args.seed)))
        return
    if not args.conversions_only:
        claims = [{"module": module, **claims_of(name)} for module, name in of_all_models(args.modules)]
        note = "Sites claimed and refused in every timm model, from one forward pass on the meta device."
        write("claims", "python -m benchmarks.coverage --claims-only", args.seed, claims, note, key="module")
    if args.claims_only:
        return
    for module in args.modules:
        row = in_its_own_process("benchmarks.coverage", module, _smallest(module), args.seed)
        print(json.dumps(row), flush=True)
        write("coverage", "python -m benchmarks.coverage", args.seed, [row], NOTE, key="module")


def _smallest(module: str) -> str:
    """The smallest model of a module with an attention to convert, or else with one that is left, or else any."""

    def parameters(name: str) -> int:
        return sum(parameter.numel() for parameter in on_meta(name).parameters())

    names = sorted(timm.list_models(module=module), key=parameters)
    return next((name for what in ("attentions", "refused") for name in names if claims_of(name)[what]), names[0])


def in_its_own_process(command_module: str, module: str, name: str, seed: int) -> dict[str, Any]:
    """So that a crash or a lack of memory is a row, not the end."""
    command = [sys.executable, "-m", command_module, "--one", module, name, "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]
    return {"module": module, "model": name, "verdict": "fails", "reason": reason}


if __name__ == "__main__":
    main()
