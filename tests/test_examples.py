"""The examples: both searches on Fashion-MNIST; every loop keeps its budget, alone and on two processes that agree."""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msa2conv
from msa2conv.workbench import working_copy

LOOPS = Path(__file__).parents[1] / "examples" / "loops"
NAMES = ("plain", "with_accelerate", "with_fabric")
ON_CPU = {"plain": {}, "with_accelerate": {}, "with_fabric": {"accelerator": "cpu"}}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts can be imported, and no Accelerator outlives its test."""
    from accelerate.state import AcceleratorState

    monkeypatch.syspath_prepend(str(LOOPS))
    monkeypatch.syspath_prepend(str(LOOPS.parent / "fashion"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def loop(name: str) -> Any:
    return importlib.import_module(name)


def check_hybrid(path: Path, search: msa2conv.Search, target: float = 0.5) -> None:
    """The file keeps the budget and holds what was trained."""
    images = torch.randn(2, 3, 32, 32)
    hybrid = msa2conv.load(path, loop("task").model()).eval()
    base = msa2conv.count_flops(search.original, images[:1])
    assert 0.99 * target * base <= msa2conv.count_flops(hybrid, images[:1]) <= target * base
    torch.testing.assert_close(hybrid(images), search.finish().model.eval()(images))
    assert not torch.equal(search.dense()(images), search.original.eval()(images))


def state_of(search: msa2conv.Search) -> dict[str, Any]:
    """What all processes must agree on."""
    return {"parameters": nn.utils.parameters_to_vector(search.model.parameters()).detach(), **search.budget.state()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return torch.equal(first["parameters"], second["parameters"]) and all(
        first[name] == second[name] for name in ("step", "log_multiplier")
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_writes_a_hybrid_that_keeps_the_budget(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hybrid.safetensors"
    search = loop(name).main(steps=6, out=path, **ON_CPU[name])
    assert search.budget.step == 6
    check_hybrid(path, search)


def test_a_hybrid_learns_in_a_plain_loop(tmp_path: Path) -> None:
    """The lines that the README shows, and what they write."""
    source = (LOOPS / "distill.py").read_text()
    _, diff = re.findall(r"^```diff\n(.*?)^```$", (LOOPS / "README.md").read_text(), re.M | re.S)
    added = re.findall(r"^ *(.*?)  # added", source, re.M)
    assert [line[1:].strip() for line in diff.splitlines() if line.startswith("+")] == added and len(added) == 5
    for line in diff.splitlines():
        assert line[1:].strip() in source
    result = loop("distill").main(steps=6, out=tmp_path / "hybrid.safetensors")
    images, base = torch.randn(2, 3, 32, 32), loop("task").model()
    again = msa2conv.load(tmp_path / "hybrid.safetensors", base).eval()
    torch.testing.assert_close(again(images), result.model(images))
    assert msa2conv.count_flops(again, images[:1]) == result.plan.flops


def test_all_loops_add_the_lines_that_the_readme_shows() -> None:
    sources = {name: (LOOPS / f"{name}.py").read_text() for name in NAMES}
    added = [re.findall(r"^ *(.*?)  # (?:added|changed)", source, re.M) for source in sources.values()]
    assert len(added[0]) == 5 and added[0] == added[1] == added[2]
    diff, _ = re.findall(r"^```diff\n(.*?)^```$", (LOOPS / "README.md").read_text(), re.M | re.S)
    assert [line[1:].strip() for line in diff.splitlines() if line.startswith("+")] == added[0]
    shown = "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("-"))
    assert shown in re.sub(r"^    |  # (?:added|changed).*", "", sources["plain"], flags=re.M)


def test_mixed_precision_leaves_the_hybrid_exact() -> None:
    from accelerate import Accelerator

    search = msa2conv.prepare(loop("task").model(), 0.8)
    images = torch.randn(4, 3, 32, 32)
    exact = search.model.eval()(images)
    model = Accelerator(mixed_precision="bf16").prepare(search.model)
    assert not torch.equal(model(images), exact)
    assert torch.equal(working_copy(model)(images), exact)
    search.penalty()
    with torch.no_grad():
        for node in search.nodes.values():
            node.gate.theta.copy_(torch.tensor([9.0, 9.0, -9.0]))
        for units in search.units.values():
            units.gate.theta.zero_()
    assert [search.decide()[path].name for path in search.nodes] == ["conv3x3"] * 3
    assert search.finish().report.laws["lowering"] <= 1e-5
    assert not torch.equal(model(images), exact)  # the user's loop goes on in bf16


def test_accelerate_saves_and_restores_a_search(tmp_path: Path) -> None:
    from accelerate import Accelerator

    task, accelerator = loop("task"), Accelerator()
    search = msa2conv.prepare(task.model(), 0.6, steps=6)
    model, optimizer = accelerator.prepare(search.model, torch.optim.AdamW(search.param_groups(1e-3)))
    accelerator.register_for_checkpointing(search)
    batches = list(task.loader(6))

    def train(part: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        for images, labels in part:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(images), labels) + search.penalty())
            optimizer.step()
        return state_of(search)

    train(batches[:3])
    accelerator.save_state(str(tmp_path))
    straight = train(batches[3:])
    accelerator.load_state(str(tmp_path))
    assert search.budget.step == 3
    assert same(train(batches[3:]), straight)


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("with_accelerate", "with_fabric", "skip_inactive"):
        assert first[name]["step"] == 4
        assert same(first[name], second[name]), name
        assert not torch.equal(first[name]["drawn"], second[name]["drawn"]), f"{name}: both drew the same gates"
    assert first["penalty"].any()
    assert torch.equal(first["reduced"], first["penalty"])  # counted once


def _process(rank: int, port: int, folder: Path) -> None:
    """One of two, in the environment that torchrun sets."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "0", "ACCELERATE_USE_CPU": "true"}
    sys.path.insert(0, str(LOOPS))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {}
    for name in ("with_accelerate", "with_fabric"):
        torch.manual_seed(rank)  # the start differs: the wrapper has to hand out that of process 0
        path, devices = folder / f"{name}.safetensors", {"devices": 2} if name == "with_fabric" else {}
        search = loop(name).main(steps=8, out=path, **devices, **ON_CPU[name])
        found[name] = state_of(search) | {"drawn": drawn(search)}
        if rank == 0:
            check_hybrid(path, search)
    torch.manual_seed(rank)
    found |= _skip_inactive()
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def _skip_inactive() -> dict[str, Any]:
    """Branches without a gradient, different ones on each process; then a loss that is the penalty alone."""
    task = loop("task")
    search = msa2conv.prepare(task.model(), 0.5, steps=4, gates=msa2conv.Gates(skip_inactive=True, init=0.1))
    model = nn.parallel.DistributedDataParallel(search.model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(search.param_groups(lr=1e-3))
    for images, labels in task.loader(4):
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + search.penalty()).backward()
        optimizer.step()
    found = {"skip_inactive": state_of(search) | {"drawn": drawn(search)}}
    thresholds, state = [gate.theta for gate in search.named_gates.values()], search.budget.state()
    with torch.no_grad():
        for theta in thresholds:
            theta.fill_(1.0)  # all open: far beyond the budget
    alone = torch.autograd.grad(search.penalty(), thresholds)
    search.budget.load(state)
    optimizer.zero_grad()
    (0 * model(images).sum() + search.penalty()).backward()
    return found | {"penalty": torch.cat(alone), "reduced": torch.cat([theta.grad for theta in thresholds])}


def drawn(search: msa2conv.Search) -> Tensor:
    """The gates of the next step."""
    return torch.cat([gate().detach() for gate in search.named_gates.values()])


def test_both_searches_on_fashion(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {f"{part}_x": generator.integers(0, 255, (64, 28, 28), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_y": generator.integers(0, 10, 64, dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "tiny.npz", **arrays)
    sizes = "--train-images 64 --calibration-images 16 --batch 16 --dense-epochs 0 --epochs 2 --search-epochs 1"
    fashion = importlib.import_module("search")
    args = fashion.parser().parse_args(["--data", str(tmp_path / "tiny.npz"), "--no-progress", *sizes.split()])
    rows = fashion.run(args)
    assert [row["model"] for row in rows] == ["dense, trained on", "calibrated", "gates (sampled)", "gates (annealed)"]
    assert all(0.69 <= float(str(row["FLOPs kept"]).rstrip("%")) / 100 <= 0.7 for row in rows[1:])
    assert [row["epochs (search + fine-tune)"] for row in rows] == ["0 + 2", "0 + 2", "1 + 1", "1 + 1"]
