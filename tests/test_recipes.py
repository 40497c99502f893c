"""Every recipe starts, says what the paper says, and its mistakes are explained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

from msa2conv import Conversion, spvit
from msa2conv.adapters import weights
from msa2conv.errors import (
    ArchitectureMismatch,
    InvalidArgument,
    InvalidCheckpoint,
    MissingDependency,
    WeightsUnavailable,
)
from msa2conv.spvit import training as published_training
from msa2conv.targets import parse_target
from msa2conv.train import run_recipe as running
from msa2conv.train.recipe import Finetune, Published, Recipe, read_recipe
from msa2conv.train.run_recipe import run_recipe

ROOT = Path(__file__).parents[1] / "recipes"
FILES = sorted(ROOT.glob("*/*.yaml"))
# Small enough to train for two steps in a second: of the real class, with the real drop path.
TINY: dict[str, dict[str, Any]] = {
    "deit": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "vit": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "swin": {"img_size": 56, "embed_dim": 24, "depths": [1, 1], "num_heads": [3, 6]},
}


def variants(quick: int | None = None) -> Iterator[Any]:
    """Of every file; with `quick`, those behind the first so many are slow."""
    for path in FILES:
        for number, variant in enumerate(yaml.safe_load(path.read_text())["variants"]):
            marks = () if quick is None or number < quick else (pytest.mark.slow,)
            yield pytest.param(path, variant, id=f"{path.parent.name}-{path.stem}-{variant}", marks=marks)


PUBLISHED = [item for item in variants() if "paper" in str(item.values[1])]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, a dark one and a bright one; train/ and val/."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for label, brightness in (("dark", 80), ("bright", 250)):
            (root / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, brightness, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{index}.png")
    return root


def small(recipe: Recipe) -> Recipe:
    """The same recipe for a network of TINY: the budget of the real one is above all it has."""
    return recipe.model_copy(update={"flops": 0.8})


def start(recipe: Recipe, photos: Path, output: Path, val: str | None = "val", **changes: Any) -> Conversion:
    kwargs = TINY[recipe.model.name.split("_")[0]]
    if "classes" in changes:
        kwargs = {**kwargs, "num_classes": changes.pop("classes")}
    keywords = {"pretrained": False, "workers": 0, "max_steps": 2, "batch_size": 4, "progress": False} | changes
    held_out = None if val is None else photos / val
    return run_recipe(small(recipe), photos / "train", held_out, output, model_kwargs=kwargs, **keywords)


def teacher() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_vit", num_classes=2).eval()


@pytest.mark.parametrize(("path", "variant"), variants(quick=1))
def test_every_recipe_starts(path: Path, variant: str, photos: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, variant)
    result = start(recipe, photos, tmp_path / "out", teacher_model=teacher())
    training = result.report.training
    assert training is not None and training.labels and training.batch_size == 4
    assert [stage["kind"] for stage in training.stages] == [stage.kind for stage in recipe.finetune.stages]
    steps = [line["step"] for line in training.curve if "loss" in line]
    assert steps == [2] * len(training.stages), "two steps of every stage"
    assert all(np.isfinite(line["loss"]) for line in training.curve if "loss" in line)
    assert training.metric == "top1" and (training.teacher == "none") == (recipe.finetune.teacher is None)
    assert result.plan.flops < result.plan.base.flops or isinstance(recipe.search, Published)
    read = Conversion.load(tmp_path / "out", original=result.original)
    assert same(read.model, result.model)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


# What the recipes say


def test_the_files_are_those_that_the_readme_lists() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(FILES) == 6
    for path in FILES:
        assert path.stem in text
    named = set(re.findall(r"`([\w-]+)`", text))
    assert {item.values[1] for item in variants()} <= named


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_imagenet_recipe_has_the_papers_variants_and_ours(path: Path) -> None:
    found = set(yaml.safe_load(path.read_text())["variants"])
    wanted = {"paper", "paper-distilled", "recommended"} if path.parent.name == "imagenet" else {"recommended", "quick"}
    assert wanted <= found


@pytest.mark.parametrize(("path", "variant"), PUBLISHED)
def test_the_papers_numbers_are_those_of_spvit(path: Path, variant: str) -> None:
    recipe = read_recipe(path, variant)
    search, finetune, augment, (stage,) = recipe.search, recipe.finetune, recipe.augment, recipe.finetune.stages
    assert isinstance(search, Published)
    wanted, distilled = spvit.config(search.name), variant.endswith("distilled")
    assert recipe.model.name == wanted.base and recipe.model.pretrained
    assert recipe.model.kwargs == {"drop_path_rate": wanted.drop_path}
    assert parse_target(recipe.flops) == round(wanted.gflops * 1e9)
    assert search.model_dump(exclude={"kind", "name", "clip"}) == {
        "epochs": wanted.search.epochs, "picked_epoch": wanted.picked_epoch, "lr": wanted.search.lr,
        "weight_decay": wanted.search.weight_decay, "gate_lr": wanted.gate_lr, "penalty": wanted.gates.penalty,
        "batch_size": wanted.batch_size,
    }  # fmt: skip
    assert wanted.search.lr == wanted.search.final_lr, "constant"
    assert finetune.batch_size == wanted.batch_size and finetune.labels is True
    schedule, mixed = wanted.finetune, wanted.augmentation
    assert stage.model_dump(exclude={"clip"}) == {
        "kind": "distill" if distilled else "labels",
        "epochs": wanted.distillation.epochs if distilled else schedule.epochs,
        "lr": schedule.lr, "final_lr": schedule.final_lr, "weight_decay": schedule.weight_decay, "warmup": 0.0,
        "mixup": mixed.mixup, "cutmix": mixed.cutmix, "smoothing": mixed.label_smoothing, "hard": distilled,
        "labels": 1 - wanted.distillation.weight, "temperature": 1.0, "hidden": 0.0, "anneal": 0.0, "ema": None,
    }  # fmt: skip
    assert stage.clip == search.clip == (5.0 if wanted.family == "swin" else None), "as in the authors' code"
    assert finetune.teacher == (wanted.distillation.teacher if distilled else None)
    assert (augment.auto_augment, augment.re_prob) == (mixed.auto_augment, mixed.random_erasing)


def test_what_a_recipe_says_of_its_search_is_what_is_searched(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def train(search: Any, stated: Any, data: Any, **keywords: Any) -> None:
        seen.update(stated=stated, **keywords)
        search.penalty()

    monkeypatch.setattr(running, "train_published", train)
    recipe = read_recipe(ROOT / "imagenet" / "swin_tiny.yaml", "paper")
    start(recipe, photos, tmp_path, batch_size=None, max_steps=1)
    wanted = spvit.config("swin_tiny", gflops=seen["stated"].gflops)
    assert seen["stated"] == wanted, "all else is the paper's"
    assert seen["clip"] == 5.0 and seen["precision"] == "bf16" and seen["batch_size"] is None


# A run that is interrupted, finished, or of other arguments


@pytest.fixture
def recipe() -> Recipe:
    return read_recipe(ROOT / "transfer" / "vit_tiny.yaml", "quick")


def test_the_same_call_continues_after_the_search_and_reads_what_is_finished(
    recipe: Recipe, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = start(recipe, photos, tmp_path / "whole")

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "finetune", stopped)
        start(recipe, photos, tmp_path / "out")
    assert (tmp_path / "out" / "converted" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "searching").exists()
    with monkeypatch.context() as patch:
        patch.setattr(running, "convert", stopped)  # nothing is searched again
        again = start(recipe, photos, tmp_path / "out")
        patch.setattr(running, "finetune", stopped)  # nor trained
        read = start(recipe, photos, tmp_path / "out")
    assert same(again.model, reference.model) and same(read.model, reference.model)
    assert read.report == again.report and read.original is not None
    assert not (tmp_path / "out" / "training" / "training.pt").exists()
    assert (tmp_path / "out" / "training" / "train_log.jsonl").exists()


def test_another_run_in_the_same_folder_is_refused(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    start(recipe, photos, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(InvalidArgument) as error:
        start(recipe, photos, tmp_path, max_steps=3, seed=1)
    assert str(error.value) == (
        f"{tmp_path}: found what a run with another weights, max_steps, seed left there; expected a run with these "
        "arguments. Pass the same arguments, or another output folder, or delete this one."
    )
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(InvalidArgument, match="what a run with another recipe, weights, size"):
        start(recipe, photos, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_papers_search_continues_after_an_interruption(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: weights, gates, optimiser, random numbers."""
    recipe = read_recipe(ROOT / "imagenet" / "deit_tiny.yaml", "paper")
    recipe = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"precision": "no"})})
    searches: list[Any] = []
    train = published_training.train

    def kept(search: Any, *args: Any, **keywords: Any) -> Any:
        searches.append(search)
        return train(search, *args, **keywords)

    monkeypatch.setattr(running, "train_published", kept)
    start(recipe, photos, tmp_path / "whole", max_steps=3, micro_batch=2)
    penalty, calls = published_training.Search.penalty, 0

    def interrupted(self: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return penalty(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(published_training.Search, "penalty", interrupted)
        start(recipe, photos, tmp_path / "out", max_steps=3, micro_batch=2)
    assert (tmp_path / "out" / "searching" / "search.pt").exists()
    result = start(recipe, photos, tmp_path / "out", max_steps=3, micro_batch=2)
    whole, _, resumed = searches
    assert same(whole.model, resumed.model)
    assert whole.budget.state() == resumed.budget.state()
    assert "SPViT's search" in result.report.calibration
    left = {path.name for path in (tmp_path / "out" / "searching").iterdir()}
    assert "train_log.jsonl" in left and "search.pt" not in left


def test_the_papers_search_is_not_continued_as_another(photos: Path, tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "imagenet" / "deit_tiny.yaml", "paper")
    torch.manual_seed(0)
    model = timm.create_model(recipe.model.name, num_classes=2, **TINY["deit"])
    stated = spvit.config("deit_tiny", gflops=3e-4)
    data = [(torch.randn(3, 32, 32), index % 2) for index in range(8)]
    search = spvit.prepare(model, stated)
    keywords: dict[str, Any] = {"batch_size": 4, "max_steps": 2, "resume": tmp_path, "progress": False}
    published_training.train(search, stated, Listed(data), **keywords)
    with pytest.raises(ArchitectureMismatch, match=r"search\.pt: found a search with another recipe, seed 0; expected"):
        other = spvit.config("deit_tiny", gflops=3e-4, penalty=5.0)
        published_training.train(search, other, Listed(data), seed=1, **keywords)


def test_the_papers_fine_tuning_starts_from_what_the_thresholds_left() -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=2, **TINY["deit"])
    search = spvit.prepare(model, spvit.config("deit_tiny", gflops=3e-4))
    with torch.no_grad():
        search.named_gates["blocks.0.attn"].theta[0] = -1.0
        search.named_gates["blocks.1.attn"].theta[1] = -1.0
        search.named_gates["blocks.1.mlp"].theta[:100] = -1.0
    start = published_training.start_of_finetuning(search)
    assert dict(start.plan.choices) == {
        "blocks.0.attn": "identity", "blocks.0.mlp": "192/192", "blocks.1.attn": "conv1x1", "blocks.1.mlp": "92/192"
    }  # fmt: skip
    assert start.report.flops_after == start.report.laws["flops"] == start.plan.flops
    assert start.report.target == 300_000 and start.original is model
    assert torch.equal(start.model.get_parameter("blocks.1.mlp.fc1.weight"), model.blocks[1].mlp.fc1.weight[100:])


class Listed(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


LAUNCHED = """
import sys, torch
from msa2conv.train.recipe import read_recipe
from msa2conv.train.run_recipe import run_recipe
torch.set_num_threads(1)
path, variant, photos, output = sys.argv[1:]
recipe = read_recipe(path, variant).model_copy(update={"flops": 0.8})
kwargs = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
run_recipe(recipe, photos + "/train", photos + "/val", output, pretrained=False, workers=0, max_steps=2, batch_size=4,
           model_kwargs=kwargs, progress=False)
"""


@pytest.mark.slow
def test_several_processes_run_one_recipe(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    """One of them calibrates and writes."""
    (tmp_path / "run.py").write_text(LAUNCHED)
    arguments = [ROOT / "transfer" / "vit_tiny.yaml", "quick", photos, tmp_path / "out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    alone = start(recipe, photos, tmp_path / "alone")
    shared = Conversion.load(tmp_path / "out", original=alone.original)
    assert shared.plan == alone.plan and shared.report.distance == alone.report.distance
    trained = [result.report.training for result in (shared, alone)]
    assert [training.processes for training in trained if training is not None] == [2, 1]
    first, last = ([t.validations[at]["val"]["loss"] for t in trained if t is not None] for at in (0, -1))
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    assert last[0] == pytest.approx(last[1], rel=0.05), "AdamW makes a step of the sign of what is nearly zero"


# Weights and teachers


def test_a_checkpoint_brings_its_classes(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **TINY["vit"])
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    result = start(recipe, photos, tmp_path / "out", checkpoint=tmp_path / "mine.pth", pretrained=None)
    assert result.original is not None and same(result.original, model)
    deeper = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": "deit_tiny_patch16_224"})})
    torch.save({"head.weight": torch.zeros(3, 48)}, tmp_path / "other.pth")
    with pytest.raises(InvalidCheckpoint, match=r"other\.pth: found keys that do not fit VisionTransformer"):
        start(deeper, photos, tmp_path / "other", checkpoint=tmp_path / "other.pth")


def test_a_recipe_for_your_own_weights_asks_for_them(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as error:
        start(recipe, photos, tmp_path, pretrained=None)
    assert str(error.value) == (
        "checkpoint: found None; expected the weights of your vit_tiny_patch16_224, which this recipe is for. Pass "
        "checkpoint=FILE, or pretrained=False to try the recipe out with random weights."
    )


def test_weights_that_cannot_be_downloaded(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: Any) -> nn.Module:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(weights, "create", offline)
    with pytest.raises(WeightsUnavailable) as error:
        start(read_recipe(ROOT / "imagenet" / "deit_tiny.yaml", "recommended"), photos, tmp_path, pretrained=None)
    assert str(error.value) == (
        "deit_tiny_patch16_224: found no pretrained weights (no route to host); expected weights that timm can "
        "download or has cached. Go online once, or pass its checkpoint, or pretrained=False to try the recipe out."
    )


def test_a_teacher_by_name(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    taught = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"teacher": "test_efficientnet"})})
    result = start(taught, photos, tmp_path)
    assert result.report.training is not None and result.report.training.teacher == "EfficientNet"


def test_the_papers_search_needs_the_models_classes(photos: Path, tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "imagenet" / "deit_tiny.yaml", "paper")
    with pytest.raises(InvalidArgument) as error:
        start(recipe, photos, tmp_path, classes=3)
    assert str(error.value) == (
        "train: found images of 2 classes; expected the 3 classes of deit_tiny_patch16_224. SPViT's search learns from "
        "labels; take a recipe whose search is calibrated."
    )


def test_other_classes_and_nothing_held_out(photos: Path, tmp_path: Path) -> None:
    """The gates and the fine-tuning then imitate the original."""
    recipe = read_recipe(ROOT / "transfer" / "vit_tiny.yaml", "gates")
    result = start(recipe, photos, tmp_path, val=None, classes=3)
    training = result.report.training
    assert training is not None and not training.labels and training.best is None
    assert training.warnings == ["trained without labels: there are 2 classes, and 3 of the model"]


# Files that are wrong

GOOD: dict[str, Any] = {
    "model": {"name": "vit_tiny_patch16_224"},
    "variants": {"mine": {"flops": 0.7, "search": {"kind": "calibrated"}, "finetune": {"stages": [{"kind": "local"}]}}},
}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_short_recipe_and_its_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, json.dumps(GOOD)), "mine")
    assert recipe.model.pretrained and recipe.augment.given == {}
    assert recipe.finetune == Finetune.model_validate({"stages": [{"kind": "local"}]})
    assert recipe.finetune.teacher == "original" and recipe.finetune.labels is None


@pytest.mark.parametrize(("text", "precision"), [("no", "no"), ("'no'", "no"), ("null", None), ("bf16", "bf16")])
def test_yamls_bare_no_is_a_precision(tmp_path: Path, text: str, precision: str | None) -> None:
    wrong = yaml.safe_load(json.dumps(GOOD))
    wrong["variants"]["mine"]["finetune"]["precision"] = "HERE"
    path = written(tmp_path, json.dumps(wrong).replace('"HERE"', text))
    assert read_recipe(path, "mine").finetune.precision == precision


WRONG: list[tuple[str, Any, str]] = [
    ("author", 1, ", author: found 1 (extra inputs are not permitted); expected fields model, variants."),
    ("model.size", 224, ", model.size: found 224 (extra inputs are not permitted); expected fields name, pretrained"),
    ("V.lr", 1.0, "mine.lr: found 1.0 (extra inputs are not permitted); expected fields flops, search, finetune"),
    ("V.flops", 50, "mine.flops: found 50; expected a fraction in (0, 1), text such as '70%' or '3.3G', or "),
    ("V.flops", "fast", "mine.flops: found 'fast'; expected a fraction in (0, 1), text such as '70%' or '3.3G', or "),
    ("V.flops", None, "mine.flops.float: found None (input should be a valid number); expected fields flops, "),
    ("V.search.epochs", 3, "search.calibrated.epochs: found 3 (extra inputs are not permitted); expected fields "),
    ("V.search.images", 2, "found 2 (input should be greater than or equal to 8); expected fields kind, images, "),
    ("V.search.kind", "random", "mine.search: found input tag 'random' found using 'kind' does not match any of"),
    ("V.search", {"kind": "gates"}, "search.gates.epochs: found nothing; expected fields kind, epochs, lr, gate_lr, "),
    ("V.finetune.stages", [{"kind": "distil"}], "stages.0.kind: found 'distil' (input should be 'local', 'distill' "),
    ("V.finetune.stages", [{"kind": "local", "clips": 1}], "stages.0.clips: found 1 (extra inputs are not permitted); "
     "expected fields kind, epochs, lr, final_lr, "),
    ("V.finetune.stages", [], "finetune.stages: found tuple should have at least 1 item after validation, not 0; "),
    ("V.finetune.precision", "int8", "precision: found 'int8' (input should be 'no', 'bf16' or 'fp16'); expected "),
    ("V.augment", {"flip": 1}, "augment.flip: found 1 (extra inputs are not permitted); expected fields scale, "),
    ("variants", {}, ", variants: found dictionary should have at least 1 item after validation, not 0; expected "),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "message"), WRONG, ids=[f"{place}-{value}" for place, value, _ in WRONG])
def test_a_wrong_field_is_named(place: str, value: Any, message: str, tmp_path: Path) -> None:
    inner = wrong = json.loads(json.dumps(GOOD))
    *parts, last = place.replace("V", "variants.mine").split(".")
    for part in parts:
        inner = inner[part]
    inner[last] = value
    path = written(tmp_path, yaml.safe_dump(wrong))
    with pytest.raises(InvalidArgument) as error:
        read_recipe(path, "mine")
    assert str(error.value).startswith(str(path)) and message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: [",
            ", line 1: found no YAML (expected the node content, but found '<stream end>'); expected a recipe",
        ),
        ("a: 1\n b: 2", ", line 2: found no YAML (mapping values are not allowed here); expected a recipe in YAML. "),
        ("model: !!python/object/apply:os.getcwd []", ", line 1: found no YAML (could not determine a constructor"),
        (
            "- model",
            ": found input should be a valid dictionary or instance of _File; expected fields model, variants.",
        ),
        ("", ": found None (input should be a valid dictionary"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidArgument) as error:
        read_recipe(path, "mine")
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as error:
        read_recipe(tmp_path / "none.yaml", "mine")
    assert str(error.value) == (
        f"{tmp_path / 'none.yaml'}: found no file that can be read (No such file or directory); expected a recipe. The "
        "folder recipes/ holds some."
    )
    with pytest.raises(InvalidArgument, match="no file that can be read"):
        read_recipe(tmp_path, "mine")
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InvalidArgument, match=r"picture\.yaml: found no YAML \(UnicodeDecodeError\)"):
        read_recipe(tmp_path / "picture.yaml", "mine")


def test_a_variant_that_is_not_there(tmp_path: Path) -> None:
    path = ROOT / "transfer" / "vit_tiny.yaml"
    with pytest.raises(InvalidArgument) as error:
        read_recipe(path, "papre")
    assert str(error.value) == (
        f"{path}, variant: found 'papre'; expected one of recommended, quick, gates. The file lists them."
    )


def test_without_pyyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = ROOT / "transfer" / "vit_tiny.yaml"
    with pytest.raises(MissingDependency) as error:
        read_recipe(path, "quick")
    assert str(error.value) == f"{path}: found no PyYAML; expected PyYAML. pip install 'msa2conv[train]'"
