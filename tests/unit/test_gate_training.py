"""The built-in loop of a gate search: what it trains on, what interrupts it, and how it goes on."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from models import images, same, vit
from sampled import sampled
from searches import prepared, put_thresholds, run, scramble
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import msa2conv
from msa2conv import Conversion, Gates, Search
from msa2conv.errors import ArchitectureMismatch, InvalidCalibrationData, NonFiniteValue
from msa2conv.gate_training import STATE_FILE, _loss, train_gates
from msa2conv.train.data import split

EPOCHS, BATCHES = 2, 5
LABELS = torch.arange(20) % 10
DATA = TensorDataset(images(20), LABELS)


def shuffled(**other: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4, shuffle=True, **other)


def searching(**other: Any) -> Search:
    return msa2conv.prepare(vit(), 0.7, steps=EPOCHS * BATCHES, **other)


def train(search: Search, data: Any = None, **other: Any) -> Search:
    arguments = {"epochs": EPOCHS, "loss": F.cross_entropy, "lr": 1e-3, "gate_lr": 0.3, "progress": False, **other}
    return train_gates(search, shuffled() if data is None else data, **arguments)


@pytest.fixture(scope="module")
def complete() -> Conversion:
    """What a search that nothing interrupts ends in."""
    return train(searching()).finish()


def assert_same(found: Conversion, expected: Conversion) -> None:
    assert found.plan == expected.plan and same(found.model, expected.model)


class Stop(RuntimeError):
    pass


def after(count: int, instead: Callable[[], Any], work: Callable[..., Any] = F.cross_entropy) -> Callable[..., Any]:
    """`work`, until it is called for the `count + 1`st time."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return work(*args, **kwargs) if calls != count + 1 else instead()

    return call


def interrupt() -> None:
    raise KeyboardInterrupt


# What it trains


def test_the_seed_decides_and_the_global_random_state_does_not(complete: Conversion) -> None:
    search = searching()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert_same(train(search).finish(), complete)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(train(searching(), seed=1).finish().model, complete.model)


def test_a_loaders_own_generator_is_seeded_too(tmp_path: Path) -> None:
    """Else what it gives would depend on how often it was asked, and a search could not be resumed."""
    loaders = [shuffled(generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    expected = train(searching(), loaders[0]).finish()
    stopped(tmp_path, KeyboardInterrupt, data=loaders[1], loss=after(7, interrupt))
    assert_same(train(searching(), loaders[1], resume=tmp_path).finish(), expected)


def test_every_epoch_sees_all_images_in_another_order_with_their_labels() -> None:
    seen: list[list[int]] = []
    where = {picture.sum().item(): int(label) for picture, label in DATA}

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.tolist())
        return F.cross_entropy(output, labels)

    search, given = searching(), list[list[int]]()
    search.model.register_forward_pre_hook(lambda _, args: given.append([where[p.sum().item()] for p in args[0]]))
    train(search, loss=loss)
    assert given == seen and len(seen) == EPOCHS * BATCHES == search.budget.step
    epochs = [[label for batch in part for label in batch] for part in (seen[:BATCHES], seen[BATCHES:])]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(LABELS.tolist())


def test_weights_and_thresholds_learn() -> None:
    search = searching()
    before = {name: parameter.detach().clone() for name, parameter in search.model.named_parameters()}
    train(search)
    still = {name for name, parameter in search.model.named_parameters() if torch.equal(parameter, before[name])}
    assert all(name.partition("attn.")[2].startswith(("bn_", "head_probs")) for name in still), "a branch not drawn"


def test_the_rate_of_the_weights_falls_and_that_of_the_gates_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = torch.optim.AdamW.step
    seen = lambda self, *args: rates.append([group["lr"] for group in self.param_groups]) or step(self, *args)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    train(searching())
    weights, same, gates = zip(*rates, strict=True)
    assert weights == same and set(gates) == {0.3} and len(rates) == EPOCHS * BATCHES
    assert weights[0] == pytest.approx(1e-3) and weights[5] == pytest.approx(0.505e-3)
    assert all(later < earlier for earlier, later in pairwise(weights)) and weights[-1] < 0.05e-3


@pytest.mark.parametrize("data", [[images(8)] * 2, [(images(8), LABELS[:8])] * 2, [[images(8), "a note"]] * 2])
def test_without_a_loss_it_imitates_the_original(data: Any) -> None:
    """Labels, if any, are not looked at."""
    search = train_gates(searching(), data, epochs=12, lr=1e-3, gate_lr=1e-9, progress=False)
    reference, distances = run(vit(), images(8)), []
    for each in (searching(), search):
        out = run(put_thresholds(each, (1.0, 1.0, -1.0)).model, images(8))
        distances.append(float(F.kl_div(out.log_softmax(1), reference.softmax(1), reduction="batchmean")))
    assert distances[1] < 0.7 * distances[0]


@pytest.mark.parametrize("name", ["vit", "features"])
def test_the_loss_without_labels(name: str) -> None:
    """KL to the original's logits, relative error of features; zero for the original itself."""
    search, data = prepared(name), tiny.images(name, 4)
    teacher = tiny.build(name)
    search.model.eval()
    with torch.no_grad():
        assert float(_loss(search, teacher, None, data, None)) < 1e-6
        out, reference = scramble(search).model(data), teacher(data)
        value = float(_loss(search, teacher, None, data, None))
    p, q = reference.softmax(1), out.softmax(1)
    kl = float((p * (p / q).log()).sum(1).mean())
    relative = float((out - reference).square().mean() / reference.square().mean())
    assert value == pytest.approx(kl if name == "vit" else relative, rel=1e-4) and value > 0.01


def test_a_batch_may_be_a_tensor_or_start_with_one() -> None:
    pictures = images(2)
    assert split(pictures)[0] is pictures and split(pictures)[1] is None
    assert split((pictures, LABELS)) == (pictures, LABELS) == split([pictures, LABELS, "name"])


def test_convert_is_prepare_train_and_finish(complete: Conversion) -> None:
    model = vit()
    training = {"epochs": EPOCHS, "loss": F.cross_entropy, "lr": 1e-3, "gate_lr": 0.3}
    result = msa2conv.convert(model, 0.7, data=shuffled(), search="gates", progress=False, **training)
    assert_same(result, complete)
    assert result.report.distance is not None and result.report.distance > 0
    assert result.report.calibration == f"a gate search of {EPOCHS * BATCHES} steps"
    assert 0.99 <= result.plan.flops / int(0.7 * result.plan.base.flops) <= 1


def test_convert_needs_neither_labels_nor_a_loss() -> None:
    gates = Gates(sampling="annealed", skip_inactive=True)
    result = msa2conv.convert(vit(), 0.6, data=[images(4)] * 3, search=gates, levers="ffn", progress=False)
    assert 0.99 <= result.plan.flops / int(0.6 * result.plan.base.flops) <= 1
    assert all("mlp" in path for path in result.plan.choices)


@pytest.mark.parametrize("progress", [True, False])
def test_progress(progress: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    train(searching(), progress=progress)
    assert capsys.readouterr() == ("", ""), "no terminal"
    monkeypatch.setattr(sys, "stderr", Terminal())
    train(searching(), progress=progress)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("search" in shown and f"/{EPOCHS * BATCHES}" in shown) if progress else shown == ""


# Data that run dry


class Once:
    """Has a length, but its batches come from one generator."""

    def __init__(self, count: int) -> None:
        self.batches = iter([(images(4), LABELS[:4])] * count)

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        return self.batches


@pytest.mark.parametrize(("count", "epoch", "found"), [(3, 1, 3), (BATCHES, 2, 0), (BATCHES + 2, 2, 2)])
def test_data_that_end_early_stop_the_search_and_its_state_is_kept(
    count: int, epoch: int, found: int, tmp_path: Path
) -> None:
    with pytest.raises(InvalidCalibrationData, match=rf"^data, epoch {epoch}: found {found} batches; expected 5"):
        train(searching(), Once(count), resume=tmp_path)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert state["done"] == state["search"]["budget"]["step"] == count


# Interruptions


def stopped(folder: Path, expected: type[BaseException], **other: Any) -> dict[str, Any]:
    """The state that an interrupted search leaves behind."""
    with pytest.raises(expected):
        train(searching(), resume=folder, **other)
    assert [path.name for path in folder.iterdir()] == [STATE_FILE]
    state: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True)
    return state


def nan() -> Tensor:
    return torch.tensor(float("nan"), requires_grad=True)


@pytest.mark.parametrize(
    ("step", "instead", "error"),
    [
        (0, nan, NonFiniteValue),
        (7, nan, NonFiniteValue),
        (3, interrupt, KeyboardInterrupt),
        (BATCHES, interrupt, KeyboardInterrupt),
    ],
)
def test_the_state_before_a_step_that_failed_is_kept(
    complete: Conversion, tmp_path: Path, step: int, instead: Any, error: type[BaseException]
) -> None:
    """Bit for bit: going on from it ends where nothing had happened."""
    state = stopped(tmp_path, error, loss=after(step, instead))
    assert state["done"] == state["search"]["budget"]["step"] == step
    assert_same(train(searching(), resume=tmp_path).finish(), complete)


def test_a_loss_that_is_not_finite_says_at_which_step(tmp_path: Path) -> None:
    """Broken images: they reach the BatchNorm statistics before the loss, and are taken out of them again."""
    pictures = images(20)
    pictures[-4:] = float("nan")
    data = DataLoader(TensorDataset(pictures, LABELS), batch_size=4)
    search = searching()
    with pytest.raises(NonFiniteValue, match=r"^search step 4: found a loss of nan; expected a finite loss. Lower lr;"):
        train(search, data, resume=tmp_path)
    assert all(torch.isfinite(value).all() for value in search.state_dict()["model"].values())
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert all(torch.equal(value, state["search"]["model"][n]) for n, value in search.state_dict()["model"].items())
    assert search.budget.step == 4 and search.finish().plan.flops <= search.target


def test_an_interruption_within_an_update_goes_back_to_the_last_save(
    complete: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_way(optimizer: Any, *args: Any) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].add_(1)
        raise KeyboardInterrupt

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", after(7, lambda: half_way(optimizers[0]), step))
    optimizers: list[Any] = []
    initialise = torch.optim.AdamW.__init__
    monkeypatch.setattr(
        torch.optim.AdamW, "__init__", lambda self, *a, **k: optimizers.append(self) or initialise(self, *a, **k)
    )
    assert stopped(tmp_path, KeyboardInterrupt, save_every=3)["done"] == 6
    monkeypatch.undo()
    assert_same(train(searching(), resume=tmp_path).finish(), complete)


def test_nothing_is_left_to_do_for_a_search_that_is_done(complete: Conversion, tmp_path: Path) -> None:
    train(searching(), resume=tmp_path / "deep" / "folder")
    again = train(searching(), resume=tmp_path / "deep" / "folder", loss=after(0, interrupt))
    assert_same(again.finish(), complete)


@pytest.mark.parametrize(("save_every", "writes"), [(1, 11), (4, 3), (100, 1)])
def test_it_saves_when_due_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int, writes: int
) -> None:
    from msa2conv import gate_training

    done: list[int] = []
    write = gate_training.write_state
    monkeypatch.setattr(gate_training, "write_state", lambda p, state: done.append(state["done"]) or write(p, state))
    train(searching(), resume=tmp_path, save_every=save_every)
    assert done == [*range(save_every, 11, save_every), 10] and len(done) == writes


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(searching(), loss=after(2, interrupt))
    assert list(tmp_path.iterdir()) == []


def test_convert_goes_on_too(complete: Conversion, tmp_path: Path) -> None:
    arguments = {"epochs": EPOCHS, "lr": 1e-3, "gate_lr": 0.3, "resume": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        msa2conv.convert(vit(), 0.7, data=shuffled(), search="gates", loss=after(6, interrupt), **arguments)
    result = msa2conv.convert(vit(), 0.7, data=shuffled(), search="gates", loss=F.cross_entropy, **arguments)
    assert_same(result, complete)


OTHER: dict[str, Callable[[], dict[str, Any]]] = {
    "seed": lambda: {"seed": 1},
    "epochs": lambda: {"epochs": 3},
    "lr": lambda: {"lr": 1e-2},
    "gate_lr": lambda: {"gate_lr": None},
    "data": lambda: {"data": [(images(4), LABELS[:4])] * 4},
    "target": lambda: {"search": msa2conv.prepare(vit(), 0.8, steps=10)},
    "gates": lambda: {"search": searching(gates=Gates(init=1.0))},
    "weights": lambda: {"search": msa2conv.prepare(tweaked(vit()), 0.7, steps=10)},
    "model": lambda: {"search": msa2conv.prepare(vit(depth=1), 0.7, steps=10)},
}


def tweaked(model: nn.Module) -> nn.Module:
    next(model.parameters()).data.add_(1e-3)
    return model


@pytest.mark.parametrize("what", sampled(OTHER, 5))
def test_another_search_is_not_continued(what: str, tmp_path: Path) -> None:
    stopped(tmp_path, KeyboardInterrupt, loss=after(3, interrupt))
    before = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(ArchitectureMismatch):
        train(**{"search": searching(), **OTHER[what]()}, resume=tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == before


KILLED = """
import os, signal, sys
import torch
import torch.nn.functional as F
torch.set_num_threads(1)
from test_gate_training import searching, train

calls = 0
def loss(output, labels):
    global calls
    calls += 1
    if calls == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(output, labels)

train(searching(), resume=sys.argv[1], save_every=3, loss=loss)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_in_the_middle_of_an_epoch(complete: Conversion, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    paths = os.pathsep.join([str(tests), str(tests / "unit")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["done"] == 6
    assert_same(train(searching(), resume=tmp_path).finish(), complete)
