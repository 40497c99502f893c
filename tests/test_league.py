"""The league: rules that can be broken, methods that keep them, runs that resume, figures that are backed."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clock
import numpy as np
import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image
from sampled import sampled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import msa2conv

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import checking, documents, measuring, plots, rules, runner, tables
from benchmarks.harness.cli import main
from benchmarks.harness.config import DENSE, Experiment, find_experiments, read_experiment
from benchmarks.harness.data import Arrays, Data
from benchmarks.harness.measuring import torch_flops
from benchmarks.harness.parents import PARENTS, load_parent, parent_of
from benchmarks.harness.reading import read
from benchmarks.harness.result import Failure, Name, Result, read_tier
from benchmarks.harness.training import Schedule, train
from benchmarks.methods import Context, Method, method_of, methods
from benchmarks.methods.torch_pruning import TorchPruning, _gradients
from msa2conv.plan import weights_sha256

ROOT = Path(__file__).parents[1]
SMALL = Experiment(
    parent="deit_fashion", data="fashion_mnist", methods=("dense", "vbp"), budgets=(0.7,), epochs=1, latency_rounds=3
)


def build() -> nn.Module:
    """A ViT of two blocks with random weights that matter."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 24, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    model = VisionTransformer(**size, embed_dim=32, depth=2, num_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def pictures(count: int = 96) -> Arrays:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 24, 24), generator=generator, dtype=torch.uint8)
    return Arrays(images, torch.randint(0, 10, (count,), generator=generator))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> runner.Stage:
    monkeypatch.setattr(rules, "SAMPLE", 16)
    return stage_of()


def stage_of() -> runner.Stage:
    split = pictures()
    return runner.Stage(SMALL, build(), Data("made up", split, split), torch.randn(1, 1, 24, 24))


def context_of(stage: runner.Stage, epochs: int = 2) -> Context:
    return Context(stage.data.train, stage.example, 64, Schedule(epochs, 1e-3), 0)


def name_of(method: str, budget: float = 0.7, seed: int = 0) -> Name:
    return Name(tier="small", experiment="deit_fashion", method=method, budget=budget, seed=seed)


# --- Methods -------------------------------------------------------------------------------------------------------


FIRST = {type(method): name for name, method in sorted(methods().items(), reverse=True)}.values()


@pytest.mark.parametrize("method", sampled(sorted(methods()), FIRST))
def test_every_method_keeps_the_rules(method: str, stage: runner.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.use(monkeypatch, clock.Clock())
    budget = stage.flops if method == DENSE else round(0.7 * stage.flops)
    digest, context = stage.digest, context_of(stage)
    model = method_of(method).shrink(stage.parent, budget, context).eval()
    flops = msa2conv.count_flops(model, stage.example)
    rules.check_budget(flops, budget, not context.in_time)
    rules.check_counters(flops, torch_flops(model, stage.example))
    rules.check_parent(stage.parent, digest)
    rules.check_batch_invariance(model, *stage.data.test.sample(16))


@pytest.mark.parametrize(
    "variant", [m for m in methods().values() if isinstance(m, TorchPruning)], ids=lambda m: m.name
)
def test_torch_pruning_of_nothing_is_the_parent(variant: TorchPruning, stage: runner.Stage) -> None:
    images, _ = stage.data.test.sample(4)
    gradients = _gradients(stage.parent, *stage.data.train.sample(8))
    same = variant.pruned(stage.parent, stage.example, 0.0, 0.0, gradients)
    torch.testing.assert_close(same(images), stage.parent(images))


def test_torch_pruning_reaches_budgets_that_its_largest_ratio_misses(stage: runner.Stage) -> None:
    """A ratio that would take a head's last dimension leaves the whole attention."""
    variant = TorchPruning("t", "magnitude", inner=True)

    def flops(ratio: float) -> int:
        return msa2conv.count_flops(variant.pruned(stage.parent, stage.example, ratio, ratio, {}), stage.example)

    assert flops(0.9) < flops(0.95)
    budget = round(1.1 * flops(0.9))
    model = variant.shrink(stage.parent, budget, context_of(stage))
    assert msa2conv.count_flops(model, stage.example) <= budget


def test_torch_pruned_parts_compute_what_the_parent_computes_without_them(stage: runner.Stage) -> None:
    """Head dimensions and hidden units that went, silenced in a copy of the parent."""
    images, labels = stage.data.train.sample(32)
    variant = TorchPruning("t", "taylor", inner=True)
    pruned: Any = variant.pruned(stage.parent, stage.example, 0.4, 0.4, _gradients(stage.parent, images, labels))
    silenced: Any = copy.deepcopy(stage.parent)
    for block, small in zip(silenced.blocks, pruned.blocks, strict=True):
        assert small.attn.head_dim < block.attn.head_dim and small.mlp.fc1.out_features < block.mlp.fc1.out_features
        units = kept_rows(block.mlp.fc1.weight, small.mlp.fc1.weight)
        block.mlp.fc2.weight[:, others(units, block.mlp.fc1.out_features)] = 0
        width, slim = block.attn.attn_dim, small.attn.attn_dim
        keys = kept_rows(block.attn.qkv.weight[width : 2 * width], small.attn.qkv.weight[slim : 2 * slim])
        gone = others(keys, width)
        for part in range(3):
            block.attn.qkv.weight[[part * width + row for row in gone]] = 0
            block.attn.qkv.bias[[part * width + row for row in gone]] = 0
    torch.testing.assert_close(pruned(images), silenced(images), rtol=1e-5, atol=1e-5)


def test_torch_pruned_width_is_the_parents_at_the_same_channels(stage: runner.Stage) -> None:
    images, labels = stage.data.train.sample(32)
    variant = TorchPruning("t", "taylor", isomorphic=True)
    pruned: Any = variant.pruned(stage.parent, stage.example, 0.25, 0.25, _gradients(stage.parent, images, labels))
    parent: Any = stage.parent
    channels = kept_rows(parent.patch_embed.proj.weight.flatten(1), pruned.patch_embed.proj.weight.flatten(1))
    assert len(channels) == 24
    for block, small in zip(parent.blocks, pruned.blocks, strict=True):
        units = kept_rows(block.mlp.fc1.weight[:, channels], small.mlp.fc1.weight)
        assert torch.equal(small.mlp.fc2.weight, block.mlp.fc2.weight[channels][:, units])
        assert torch.equal(small.norm1.weight, block.norm1.weight[channels])
    assert torch.equal(pruned.head.weight, parent.head.weight[:, channels])
    assert torch.equal(pruned.pos_embed, parent.pos_embed[..., channels])


def kept_rows(whole: Tensor, part: Tensor) -> list[int]:
    """Where the rows of `part` are in `whole`."""
    found = [(whole == row).all(1).nonzero().flatten().tolist() for row in part]
    assert all(len(rows) == 1 for rows in found)
    return [rows[0] for rows in found]


def others(kept: list[int], count: int) -> list[int]:
    return sorted(set(range(count)) - set(kept))


def test_the_method_in_the_documents_is_short_and_keeps_the_rules(stage: runner.Stage) -> None:
    text = (ROOT / "docs" / "benchmarks" / "README.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    assert code.count("\n") < 50
    namespace: dict[str, Any] = {"__name__": "newcomer"}
    exec(code, namespace)
    result = runner.run_one(stage, name_of("every-other"), namespace["METHODS"][0], told(stage))
    assert result.notes["widths"] and result.after is not None


def told(stage: runner.Stage) -> Any:
    return runner.circumstances(stage, name_of("vbp"))


# --- Rules ---------------------------------------------------------------------------------------------------------


class Broken:
    """A method that does as it is told."""

    name, keeps_grid = "vbp", True

    def __init__(self, shrink: Callable[[nn.Module], nn.Module]) -> None:
        self.does = shrink

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        return self.does(parent)


class Leaking(nn.Module):
    """Normalises by the batch: an image hears of the others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return out - out.mean(0) if len(x) > 1 else out


class Restless(nn.Module):
    """Its weights move while it is used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            next(self.model.parameters()).add_(1e-7)
        return self.model(x)


def altered(parent: nn.Module) -> nn.Module:
    small = method_of("vbp").shrink(parent, 10**9, Context(pictures(), torch.randn(1, 1, 24, 24), 64))
    next(parent.parameters()).data += 1
    return small


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (copy.deepcopy, "budget: found"),
        (altered, "parent: found other weights"),
        (lambda parent: Leaking(shrunk(parent)), "batch invariance: found"),
        (lambda parent: Restless(shrunk(parent)), "network: found other weights"),
    ],
    ids=["too large", "parent touched", "batch statistics", "weights that move"],
)
def test_broken_rules_are_named(
    does: Callable[[nn.Module], nn.Module], said: str, stage: runner.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "experiment", SMALL.model_copy(update={"epochs": 0}))
    with pytest.raises(rules.RuleBroken, match=said):
        runner.run_one(stage, name_of("vbp"), Broken(does), told(stage))


def shrunk(parent: nn.Module) -> nn.Module:
    context = Context(pictures(), torch.randn(1, 1, 24, 24), 64)
    budget = round(0.7 * msa2conv.count_flops(parent, context.example))
    return method_of("vbp").shrink(parent, budget, context)


class Undecided(nn.Module):
    """Says something else of one image where it is not alone."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.flatten(1)[:, :10].clone()
        out[x.flatten(1)[:, 0] == 99, 1] = 200.0 if len(x) > 1 else 0.0
        return out + 0 * self.bias

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))


def test_one_image_whose_class_depends_on_the_batch_is_enough() -> None:
    images = torch.rand(128, 1, 4, 4)
    images[5, 0, 0, 0] = 99
    labels = images.flatten(1)[:, :10].argmax(1)
    with pytest.raises(rules.RuleBroken, match=r"accuracy of 100\.00% one by one and 99\.22% in shuffled batches"):
        rules.check_batch_invariance(Undecided().eval(), images, labels)


class Rounds(Undecided):
    """Answers otherwise in a batch, but in float32 alone, as rounding does at a tie."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] + (len(x) > 1) * (x.dtype == torch.float32) + 0 * self.bias


def test_rounding_in_float32_is_no_dependence_on_the_batch() -> None:
    images = torch.rand(128, 1, 4, 4)
    found = rules.check_batch_invariance(Rounds().eval(), images, images.flatten(1)[:, :10].argmax(1))
    assert (found["images"], found["moved"], found["accuracy"]) == (128, 0, 100)


def test_where_every_merge_is_a_tie_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "decision_margins", lambda model, images: torch.zeros(len(images)))
    found = rules.check_batch_invariance(Undecided().eval(), torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.long))
    assert (found["images"], found["undecided"], found["accuracy"]) == (0, 1, 0)


def test_counters_that_disagree() -> None:
    with pytest.raises(rules.RuleBroken, match=r"FLOPs: found 1,000 multiply-adds by msa2conv, 1,100 by torch"):
        rules.check_counters(1000, 1100)
    rules.check_counters(1000, 1005)


# --- Training ------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_remembered_says_what_it_would_say() -> None:
    split, teacher = pictures(), build()
    for images, _, answers in split.lessons(32, 3, teacher):
        assert answers is not None
        torch.testing.assert_close(answers, teacher(images), rtol=1e-4, atol=1e-5)
    mirrored = next(split.lessons(96, 3, teacher))[0]
    assert not torch.equal(mirrored, next(split.lessons(96, 4, teacher))[0])


def test_everybody_gets_the_same_lessons() -> None:
    split, seen = pictures(), []
    for _ in range(2):
        model = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 10))
        heard: list[Tensor] = []
        model[0].register_forward_pre_hook(lambda _m, args, heard=heard: heard.append(args[0]))
        train(model, split, Schedule(2, 1e-3, 32), None, seed=5)
        seen.append(torch.cat(heard))
    assert torch.equal(*seen) and len(seen[0]) == 2 * len(split)


# --- Runs ----------------------------------------------------------------------------------------------------------


class Interrupts:
    """Goes wrong once, in the way it is told."""

    name, keeps_grid = "vbp", True

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error
        self.asked = 0

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        self.asked += 1
        error, self.error = self.error, None
        if error is not None and self.asked == 1:
            raise error
        return methods()["vbp"].shrink(parent, budget, context)


@pytest.fixture
def league(stage: runner.Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Name]]:
    """Run names on the small stage, with a method in place of `vbp`."""

    def run(names: list[Name], stand_in: Method | None = None, **options: Any) -> list[Name]:
        find = lambda name: stand_in if stand_in is not None and name == "vbp" else methods()[name]  # noqa: E731
        monkeypatch.setattr(runner, "method_of", find)
        monkeypatch.setattr(runner, "read_experiment", lambda tier, name: SMALL)
        options = {"out": tmp_path / "results", "say": lambda _: None, **options}
        return runner.run_all(names, lambda experiment: stage, **options)

    return run


def test_one_calibration_serves_every_budget_and_its_time_counts_each_time(stage: runner.Stage) -> None:
    method, seconds = methods()["ours-mixers"], list[float]()
    contexts = [stage.context(seed) for seed in (0, 0, 1)]
    for context, budget in zip(contexts, (0.8, 0.7, 0.7), strict=True):
        model = method.shrink(stage.parent, round(budget * stage.flops), context)
        rules.check_budget(msa2conv.count_flops(model, stage.example), round(budget * stage.flops))
        seconds.append(context.spared)
    assert len(stage.kept) == 2 and seconds[0] == seconds[2] == 0 < seconds[1]
    alone = method.shrink(stage.parent, round(0.7 * stage.flops), replace(stage, kept={}).context(0))
    second = method.shrink(stage.parent, round(0.7 * stage.flops), stage.context(0))
    assert weights_sha256(alone) == weights_sha256(second)


def test_a_budget_of_time_is_kept_beside_the_one_of_flops(stage: runner.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.use(monkeypatch, clock.Clock())
    context, budget = stage.context(0), round(0.8 * stage.flops)
    model = methods()["ours-time-32"].shrink(stage.parent, budget, context)
    inputs = stage.example.expand(32, -1, -1, -1)
    ratio = clock.seconds(partial(model, inputs)) / clock.seconds(partial(stage.parent, inputs))
    assert context.in_time and ratio <= 0.8 * 1.02 and "% used" in context.notes["latency"]  # of the budget of time
    flops = msa2conv.count_flops(model, stage.example)
    rules.check_budget(flops, budget, all_of_it=False)
    with pytest.raises(rules.RuleBroken, match="to 1 %"):
        rules.check_budget(round(1.02 * budget), budget, all_of_it=False)
    with pytest.raises(rules.RuleBroken, match="to 1 %"):
        rules.check_budget(round(0.98 * budget), budget)


def test_training_the_parent_in_place_of_a_copy_is_noticed(stage: runner.Stage) -> None:
    class Sharing(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)  # type: ignore[no-any-return]

    with pytest.raises(
        rules.RuleBroken, match="parent: found other weights than before; expected the parent untouched"
    ):
        runner.run_one(stage, name_of("dense", 1.0), Broken(Sharing), told(stage))


def test_an_interrupted_sweep_goes_on(league: Callable[..., list[Name]], tmp_path: Path) -> None:
    names, out = [name_of("dense", 1.0), name_of("vbp")], tmp_path / "results"
    method = Interrupts(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        league(names, method)
    assert names[0].path(out).is_file() and not names[1].path(out).is_file()
    before = names[0].path(out).read_bytes()
    assert league(names, method) == [] and method.asked == 2
    assert names[0].path(out).read_bytes() == before
    assert league(names, method) == [] and method.asked == 2
    league(names, method, again=True)
    assert method.asked == 3
    assert sorted(path.suffix for path in out.rglob("*") if path.is_file() and path.suffix != ".lock") == [".json"] * 2


def test_processes_leave_runs_to_each_other(league: Callable[..., list[Name]], tmp_path: Path) -> None:
    names, out, lines = [name_of("dense", 1.0), name_of("vbp")], tmp_path / "results", list[str]()
    lock = names[0].path(out).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert league(names, say=lines.append) == []
    assert lines[0] == "small/deit_fashion dense-1-s0: another process is at it"
    assert not names[0].path(out).is_file() and names[1].path(out).is_file()


def test_what_another_process_did_meanwhile_is_done(league: Callable[..., list[Name]], tmp_path: Path) -> None:
    """Also if it failed, and if everything is to be done again."""
    names, out = [name_of("dense", 1.0), name_of("vbp")], tmp_path / "results"
    refuses = Interrupts(msa2conv.errors.InfeasibleBudget("budget", "5", "7", "Ask for more."))

    def meanwhile(line: str) -> None:
        if line.startswith("small/deit_fashion dense-1-s0: 1.000"):
            league(names[1:], refuses)

    assert league(names, refuses, say=meanwhile, again=True) == [] and refuses.asked == 1
    assert names[1].path(out, failed=True).is_file() and not names[1].path(out).exists()


@torch.no_grad()
def test_time_may_be_taken_elsewhere(stage: runner.Stage) -> None:
    elsewhere, before = replace(stage, time_on="meta"), weights_sha256(stage.parent)
    assert set(elsewhere.speed(stage.parent)) == {1, 32}
    assert re.search(r"threads, timed on .*threads$", elsewhere.device)
    assert weights_sha256(stage.parent) == before  # which lie where they were


def test_a_refusal_is_kept_until_it_works(league: Callable[..., list[Name]], tmp_path: Path) -> None:
    names, out = [name_of("vbp"), name_of("dense", 1.0)], tmp_path / "results"
    method = Interrupts(msa2conv.errors.InfeasibleBudget("budget", "5", "7", "Ask for more."))
    assert league(names, method) == names[:1]
    failure = Failure.model_validate_json(names[0].path(out, failed=True).read_text())
    assert failure.error == "InfeasibleBudget: budget: found 5; expected 7. Ask for more."
    assert names[1].path(out).is_file()
    assert league(names, method) == [] and not names[0].path(out, failed=True).exists()


def test_a_result_says_whether_it_kept_a_budget_of_time(league: Callable[..., list[Name]], tmp_path: Path) -> None:
    class InTime:
        name, keeps_grid = "vbp", True

        def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
            context.in_time = True
            return methods()["vbp"].shrink(parent, budget, context)

    for stand_in in (InTime(), None):
        assert league([name_of("vbp")], stand_in, again=True) == []
        (result,) = read_tier("small", tmp_path / "results")
        assert result.in_time is (stand_in is not None)


def test_a_result_says_everything(shown: Path) -> None:
    dense, vbp = read_tier("small", shown)
    assert dense.kept == 1 and dense.before.kl == pytest.approx(0, abs=1e-9) and dense.before.agreement == 100
    assert 0.693 <= vbp.kept <= 0.707 and vbp.flops == vbp.torch_flops and vbp.parameters < vbp.parent_parameters
    assert sum(vbp.blocks.values()) == vbp.flops and list(vbp.blocks) == ["blocks.0", "blocks.1", "elsewhere"]
    assert set(vbp.speed) == {1, 32} and vbp.speed[1].seconds > 0 and vbp.speed[32].spread >= 0
    assert vbp.after is not None and set(vbp.seconds) == {"convert", "evaluate", "train", "time"}
    assert vbp.circumstances.command.startswith("python -m benchmarks run small/deit_fashion --methods vbp")
    assert vbp.circumstances.git and "torch" in vbp.circumstances.versions
    assert vbp.batch_invariance["images"] == 96 and (vbp.peak_memory_gib or 1) > 0


# --- What is shown -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two results, and the documents and plots that show them."""
    folder: Path = tmp_path_factory.mktemp("finished")
    (folder / "README.md").write_text("# A\n<!-- league: small -->\n<!-- end -->\nB\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "read_experiment", lambda tier, name: SMALL)
        names = [name_of("dense", 1.0), name_of("vbp")]
        assert not runner.run_all(names, lambda _: stage_of(), out=folder / "results", say=lambda _: None)
        point_to(folder, patch)
        documents.update(results=folder / "results", plots=True)
    return folder


def test_a_row_far_below_the_others_does_not_press_them_together() -> None:
    axis = Figure().subplots()
    heights = [86.2, 85.5, 85.0, 84.5, 40.0]
    axis.plot(heights)
    plots._stretch(axis, heights)
    low, *_, fourth, third, second, best = axis.transData.transform([(0, y) for y in sorted([0.0, *heights])])[:, 1]
    assert best - fourth > 0.2 * (best - low) and best - second > second - third, "the best have room"
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "86",
        "85",
        "84",
        "83",
        "81",
        "78",
        "74",
        "66",
        "56",
    ]


def test_rivals_are_listed_and_shaded_by_rank() -> None:
    heights = {"ours": 80.0, "bad": 60.0, "good": 86.0, "dense": 87.0, "ours-gates": 70.0, "middling": 84.0}
    rows: Any = [SimpleNamespace(method=m, final=SimpleNamespace(mean=top1)) for m, top1 in heights.items()]
    styles = plots._styles(rows)
    assert {method: style["color"] for method, style in styles.items()} == {
        "ours": "C0", "ours-gates": "C1", "good": "0.000", "middling": "0.375", "bad": "0.750",
    }  # fmt: skip
    assert list(styles) == ["ours", "ours-gates", "good", "middling", "bad"]
    assert len({style["marker"] for style in styles.values()}) == 5


def test_a_league_ranks_who_ran_everything_and_marks_what_noise_may_have_put_second() -> None:
    tops = {
        ("dense", 1.0): [90.0],
        ("ours", 0.7): [86.0, 86.4], ("ours", 0.5): [85.0, 85.2],
        ("rival", 0.7): [86.1, 86.9], ("rival", 0.5): [80.0, 80.6],
        ("easy", 0.7): [86.9],
        ("loses", 0.7): [85.0], ("loses", 0.5): [84.0],
        ("quick", 0.9): [86.0], ("quick", 0.7): [87.0], ("quick", 0.5): [88.0],
        ("untrained", 0.7): [60.0], ("untrained", 0.5): [59.0],
    }  # fmt: skip
    results: Any = [
        SimpleNamespace(
            name=SimpleNamespace(experiment="micro", budget=budget, method=method, seed=seed),
            keeps_grid=method != "loses",
            final=SimpleNamespace(top1=top1),
            after=None if method == "untrained" else SimpleNamespace(top1=top1),
            before=SimpleNamespace(top1=top1 - 50, kl=budget / 10),
            in_time=method == "quick",
        )
        for (method, budget), values in tops.items()
        for seed, top1 in enumerate(values)
    ]
    assert tables.league(results, grid_only=False).splitlines() == [
        "|  | method | micro 70% | micro 50% | mean |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | ours | 86.2 ± 0.3 | **85.1 ± 0.1** | 85.7 |",
        "| 2 | loses | 85.0 n=1 | 84.0 n=1 | 84.5 |",
        "| 3 | rival | **86.5 ± 0.6** | 80.3 ± 0.4 | 83.4 |",
        "|  | easy | **86.9** n=1 | – |  |",
    ]
    assert "loses" not in tables.league(results, grid_only=True)
    assert "quick" not in tables.league(results, grid_only=False)
    assert "90%" not in tables.league(results, grid_only=False)
    before = tables.league(results, grid_only=False, trained=False)
    assert "untrained" in before
    assert "| 1 | ours | 36.2 ± 0.3 (0.070) | **35.1 ± 0.1** (0.050) | 35.7 |" in before


def test_a_budget_that_only_methods_in_time_have_is_one_of_time(shown: Path) -> None:
    dense, vbp = read_tier("small", shown)
    in_time = vbp.model_copy(update={"name": vbp.name.model_copy(update={"budget": 0.9}), "in_time": True})
    headings = [
        line for line in tables.experiment_tables([dense, vbp, in_time], []).splitlines() if line.startswith("#")
    ]
    assert headings == ["### deit_fashion, 90% of the time", "### deit_fashion, 70% of the FLOPs"]


def point_to(folder: Path, patch: pytest.MonkeyPatch) -> None:
    docs = folder / "docs"
    for module in (documents, checking):
        patch.setattr(module, "DOCS", docs)
    patch.setattr(documents, "README", folder / "README.md")
    patch.setattr(checking, "picture", lambda *names: documents.picture(*names, docs))


@pytest.fixture
def shown(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil; returns where the results are."""
    shutil.copytree(finished, tmp_path / "copy")
    point_to(tmp_path / "copy", monkeypatch)
    return tmp_path / "copy" / "results"


def test_what_is_shown_is_backed(shown: Path) -> None:
    assert checking.problems(shown) == []
    assert "| vbp |" in documents.README.read_text() and "\nB\n" in documents.README.read_text()


def test_one_experiment_of_a_tier_is_shown_alone(shown: Path) -> None:
    own, other = (
        documents.filled(f"<!-- league: small/{name} -->\n<!-- end -->", shown)
        for name in (name_of("vbp").experiment, "other")
    )
    assert "| vbp |" in own
    assert other == "<!-- league: small/other -->\nNothing has been run yet.\n<!-- end -->"


def test_a_figure_without_a_result_is_named(shown: Path) -> None:
    path = documents.DOCS / "small.md"
    text = path.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| vbp | yes"))
    path.write_text(text.replace(row, re.sub(r"\d+\.\d", "99.9", row, count=1)))
    assert any("99.9" in problem and "which no result file says" in problem for problem in checking.problems(shown))


def test_a_result_that_is_gone_is_missed(shown: Path) -> None:
    name_of("vbp").path(shown).unlink()
    found = checking.problems(shown)
    assert any("small.md" in problem for problem in found)
    assert sum("drawn from other results" in problem for problem in found) == len(documents.PICTURES)
    assert any("README.md" in problem and "vbp" in problem for problem in found)
    name_of("dense", 1.0).path(shown).unlink()
    assert any("no result of its tier" in problem for problem in checking.problems(shown))


def test_a_result_under_a_strange_name_is_refused(shown: Path) -> None:
    path = name_of("vbp").path(shown)
    path.rename(path.with_name("ours-0.7-s0.json"))
    with pytest.raises(msa2conv.errors.InvalidCheckpoint, match=r"ours-0\.7-s0\.json: found the result of vbp-0\.7-s0"):
        read_tier("small", shown)


def test_plots_say_what_they_show(shown: Path) -> None:
    path = documents.picture("small", "deit_fashion", "accuracy", documents.DOCS)
    assert plots.shown_digest(path) == plots.digest(read_tier("small", shown))


def test_the_documents_of_the_repository_are_backed() -> None:
    assert checking.problems() == []


# --- Configs and errors --------------------------------------------------------------------------------------------

EXPERIMENTS = [pair for tier in ("small", "untrained", "photos", "imagenet") for pair in find_experiments(tier)]


@pytest.mark.parametrize(("tier", "name"), EXPERIMENTS, ids="/".join)
def test_configs_name_what_exists(tier: str, name: str) -> None:
    experiment = read_experiment(tier, name)
    runs = experiment.runs(tier, name)
    own = sum(map(len, experiment.budgets_of.values()))
    per_seed = 1 + (len(experiment.methods) - 1) * len(experiment.budgets) + own
    assert len(runs) == len(set(runs)) == per_seed * len(experiment.seeds)
    assert all(method_of(run.method).name == run.method for run in runs)
    assert parent_of(experiment.parent).example.shape[0] == 1


def test_a_part_of_a_matrix() -> None:
    experiment = read_experiment("small", "deit_fashion")
    runs = experiment.runs("small", "deit_fashion", ["dense", "ours"], [0.5, 1.0], [1])
    assert [run.stem for run in runs] == ["dense-1-s1", "ours-0.5-s1"]
    with pytest.raises(msa2conv.errors.InvalidArgument, match=r"--budgets: found 0\.2; expected of small/deit_fashion"):
        experiment.runs("small", "deit_fashion", budgets=[0.2])


def test_a_method_may_have_budgets_of_its_own() -> None:
    experiment = SMALL.model_copy(update={"budgets_of": {"vbp": (0.9, 0.7)}, "methods": ("dense", "ours", "vbp")})
    assert [run.stem for run in experiment.runs("small", "mine")] == [
        "dense-1-s0", "vbp-0.9-s0", "ours-0.7-s0", "vbp-0.7-s0",
    ]  # fmt: skip
    assert [run.stem for run in experiment.runs("small", "mine", budgets=[0.9])] == ["vbp-0.9-s0"]
    with pytest.raises(
        msa2conv.errors.InvalidArgument,
        match=r"--budgets: found none of dense, ours; expected of small/mine: dense 1, ours 0\.7. Add it to budgets_of",
    ):
        experiment.runs("small", "mine", ["dense", "ours"], [0.9])


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "small" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("parent: deit_fashion\ndata: fashion_mnist\nmethods: [ours]\nbudgets: [1.5]\n")
    with pytest.raises(msa2conv.errors.InvalidArgument, match=r"config\.yaml, budgets\.0: found 1\.5 .*less than 1"):
        read_experiment("small", "mine", tmp_path)
    (folder / "config.yaml").write_text(
        "parent: deit_fashion\ndata: fashion_mnist\nmethods: [ours]\nbudgets: [0.5]\nbudgets_of: {vbp: [0.9]}\n"
    )
    with pytest.raises(msa2conv.errors.InvalidArgument, match=r"budgets_of: found .*vbp is not among the methods"):
        read_experiment("small", "mine", tmp_path)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(msa2conv.errors.InvalidArgument, match=r"config\.yaml: found no YAML"):
        read_experiment("small", "mine", tmp_path)
    with pytest.raises(msa2conv.errors.InvalidArgument, match=r"experiment: found 'huge'; expected small/mine"):
        find_experiments("huge", tmp_path)
    with pytest.raises(msa2conv.errors.InvalidArgument, match=r"method: found 'magic'; .*benchmarks/methods"):
        method_of("magic")
    with pytest.raises(msa2conv.errors.InvalidTrainingData, match=r"cifar10_jpeg\.npz: found no such .*--data FOLDER"):
        read("cifar10", tmp_path, 32)
    (tmp_path / "fashion_mnist.npz").write_bytes(b"")
    with pytest.raises(msa2conv.errors.InvalidCheckpoint, match=r"vit_tiny: found no such file.*--weights FILE"):
        load_parent("vit_tiny")
    with pytest.raises(msa2conv.errors.InvalidCheckpoint, match=r"python -m benchmarks train swin_fashion"):
        load_parent("swin_fashion", tmp_path / "none.safetensors")


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A folder with 64 made-up images under the name of Fashion-MNIST."""
    draw = np.random.default_rng(0)
    arrays = {f"{part}_x": draw.integers(0, 256, (64, 28, 28), dtype="uint8") for part in ("train", "test")}
    arrays |= {f"{part}_y": draw.integers(0, 10, 64, dtype="uint8") for part in ("train", "test")}
    np.savez(tmp_path / "fashion_mnist.npz", **arrays)
    return tmp_path


def test_images_sorted_by_class_are_mixed_or_refused(fashion: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 32)).save(jpeg, "JPEG")
    size, labels = len(jpeg.getvalue()), np.repeat(np.arange(2), 50).astype("uint8")
    packed = {"jpeg": np.frombuffer(jpeg.getvalue() * 100, "uint8"), "offsets": np.arange(101) * size, "labels": labels}
    np.savez(
        fashion / "cifar10_jpeg.npz", **{f"{part}_{key}": x for part in ("train", "test") for key, x in packed.items()}
    )
    data = read("cifar10", fashion, 32, 40, 40)
    assert all(10 < int(split.labels.sum()) < 30 for split in (data.train, data.test))
    arrays = dict(np.load(fashion / "fashion_mnist.npz"))
    np.savez(fashion / "fashion_mnist.npz", **{**arrays, "test_y": np.sort(arrays["test_y"] % 2)})
    with pytest.raises(
        msa2conv.errors.InvalidTrainingData, match=r"fashion_mnist\.npz: found 1 classes in its first 20"
    ):
        read("fashion_mnist", fashion, 28, None, 20)


def test_the_command_line_trains_runs_and_fails(
    fashion: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARENTS, "deit_fashion", replace(PARENTS["deit_fashion"], epochs=1))
    monkeypatch.setattr(rules, "SAMPLE", 8)
    monkeypatch.setattr(measuring, "_OFTENER", 1)
    weights, data, out = fashion / "deit.safetensors", ["--data", str(fashion)], ["--out", str(fashion / "results")]
    threads = ["--threads", "1"]
    assert main(["train", "deit_fashion", *data, "-o", str(weights), *threads]) == 0
    assert "on 64 test images of fashion_mnist" in capsys.readouterr().out
    one = [
        "run",
        "small/deit_fashion",
        "--budgets",
        "0.7",
        "--seeds",
        "0",
        "--weights",
        str(weights),
        "--quiet",
        *threads,
    ]
    assert main([*one, "--methods", "vbp", *data, *out]) == 0
    (result,) = read_tier("small", fashion / "results")
    assert result.name.stem == "vbp-0.7-s0" and result.after is not None
    monkeypatch.setattr(rules, "TOLERANCE", 0.0)
    assert main([*one, "--methods", "ffn-taylor", *data, *out]) == 1
    assert "RuleBroken: budget" in capsys.readouterr().out


def test_a_folder_of_images_is_read(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "imagenet" / part / label
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (40, 40), (90 * index, 9, 9)).save(folder / f"{index}.png")
    data = read("imagenet", tmp_path, 32, train_images=3)
    split = replace(data.train, workers=0)
    assert (len(data.train), len(data.test)) == (3, 4)
    assert [len(labels) for _, labels in split.batches(2, seed=0)] == [2, 1]
    images, _, answers = next(split.lessons(4, 0, nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))))
    assert images.shape == (3, 3, 32, 32) and answers is not None and answers.shape == (3, 10)
    assert sorted(data.test.sample(4)[1].tolist()) == [0, 0, 1, 1]


def test_the_command_line_lists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["list", "small/deit_fashion", "--out", str(tmp_path)]) == 0
    assert "small/deit_fashion ours-0.7-s0" in capsys.readouterr().out


def test_results_are_plain_json(shown: Path) -> None:
    path = name_of("vbp").path(shown)
    assert Result.model_validate(json.loads(path.read_text())).name == name_of("vbp")
