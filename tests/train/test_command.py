"""`msa2conv finetune`, and the images that it finds by a path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torchvision.transforms import ToTensor
from typer.testing import CliRunner

import msa2conv
from msa2conv import Conversion, errors
from msa2conv.cli import app
from msa2conv.data.sources import images_at
from msa2conv.train import trainer

NAME = "test_vit"  # timm's own for tests: six blocks of width 64, 160 x 160
SIZE = {"num_classes": 3, "img_size": 32}
run = CliRunner().invoke
pytestmark = pytest.mark.xdist_group("finetune")  # on one worker, so that what they share is made once


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msa2conv.cli.shown.console", Console(width=160))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of three classes and twelve photos of noise."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        folder = root / f"class{index % 3}"
        folder.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of a hybrid, checkpoint of its original): a ViT for images of 32 pixels."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = timm.create_model(NAME, **SIZE).eval()
    result = msa2conv.convert(model, 0.8, data=torch.randn(16, 3, 32, 32), levers="ffn", progress=False)
    result.save(root / "out")
    save_file(model.state_dict(), root / "original.safetensors")
    return root / "out", root / "original.safetensors"


def command(made: tuple[Path, Path], photos: Path, output: Path, *more: str) -> list[str]:
    options = ["--train", photos, "--original", made[1], "-o", output, "--batch-size", 6, "--workers", 0]
    return ["finetune", str(made[0]), *map(str, options), "--no-progress", *more]


def test_it_writes_a_trained_hybrid(made: tuple[Path, Path], photos: Path, tmp_path: Path) -> None:
    result = run(app, command(made, photos, tmp_path, "--val", str(photos), "--epochs", "2"))
    assert result.exit_code == 0, result.output
    assert (
        "fine-tuned: epochs 1 x local + 2 x distill, 12 images, batch 6; taught by labels and the origi"
        in result.output
    )
    assert f"written to {tmp_path}/   next: msa2conv eval {tmp_path} --images DIR" in result.output
    names = {"model.safetensors", "plan.json", "report.json", "README.md", "train_log.jsonl", "tensorboard"}
    names |= {"report.html", "figures"}
    assert {path.name for path in tmp_path.iterdir()} == names, "the state of the training is gone"
    before, after = (Conversion.load(path) for path in (made[0], tmp_path))
    assert after.plan == before.plan and after.report.training is not None and before.report.training is None
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert lines == after.report.training.curve


def test_interrupted_the_same_command_continues(
    made: tuple[Path, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command(made, photos, tmp_path / "whole", "--epochs", "2", "--teacher", "none")
    assert run(app, whole).exit_code == 0
    parts = command(made, photos, tmp_path / "parts", "--epochs", "2", "--teacher", "none")
    calls = 0
    train = trainer.run

    def stopped(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        train(*args, **kwargs)

    monkeypatch.setattr(trainer, "run", stopped)
    result = run(app, parts)
    assert result.exit_code != 0
    assert f"interrupted: the same command continues with what {tmp_path}/parts/training/ holds" in result.stderr
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"training"}
    result = run(app, parts)
    assert result.exit_code == 0 and calls == 3, "one epoch was left"
    one, other = (Conversion.load(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_starting_anew(made: tuple[Path, Path], photos: Path, tmp_path: Path) -> None:
    training = tmp_path / "training"
    training.mkdir()
    (training / "training.pt").write_text("what an older version left")
    again = command(made, photos, tmp_path, "--max-steps", "1", "--stages", "labels")
    assert isinstance(run(app, again).exception, errors.InvalidCheckpoint)
    assert run(app, [*again, "--no-resume"]).exit_code == 0


def test_a_new_classifier_for_other_classes(made: tuple[Path, Path], photos: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("class0", "class1"):
        (tmp_path / "two" / name).symlink_to(photos / name)
    plain = run(app, command(made, tmp_path / "two", tmp_path / "out", "--max-steps", "1"))
    assert "warning: trained without labels: there are 2 classes, and 3 of the model" in plain.output
    result = run(app, command(made, tmp_path / "two", tmp_path / "head", "--max-steps", "1", "--reset-head"))
    assert result.exit_code == 0, result.output
    assert msa2conv.load(tmp_path / "head").num_classes == 2


def test_stages_and_teachers_by_name(made: tuple[Path, Path], photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(timm.create_model(NAME, num_classes=3).state_dict(), tmp_path / "teacher.safetensors")
    more = ["--teacher", NAME, "--teacher-checkpoint", str(tmp_path / "teacher.safetensors"), "--max-steps", "1"]
    result = run(app, command(made, photos, tmp_path / "out", "--stages", "local,distill=2", *more))
    assert result.exit_code == 0, result.output
    assert (
        "2 x distill (at most 1 steps of each), 12 images, batch 6; taught by labels and VisionTransformer"
        in result.output
    )


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        (
            ["--stages", "local=many"],
            errors.InvalidArgument,
            "--stages: found 'local=many'; expected KIND or KIND=EPOCHS. For example local,distill=10,labels=2.",
        ),
        (["--teacher", "resnet51"], errors.InvalidArgument, "NAME: found 'resnet51', which timm "),
        (["--val", "nowhere"], errors.InvalidArgument, "nowhere: found no images ("),
    ],
)
def test_options_that_cannot_be_used(
    made: tuple[Path, Path], photos: Path, tmp_path: Path, more: list[str], error: type[Exception], text: str
) -> None:
    result = run(app, command(made, photos, tmp_path, *more))
    assert isinstance(result.exception, error) and str(result.exception).startswith(text)


def test_the_originals_weights_are_needed(
    made: tuple[Path, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, **kwargs: Any) -> None:
        raise errors.WeightsUnavailable(name, "no network", "one", "Go online.")

    monkeypatch.setattr("msa2conv.train.finetune.downloaded", offline)
    options = ["--train", str(photos), "-o", str(tmp_path), "--no-progress"]
    result = run(app, ["finetune", str(made[0]), *options])
    assert isinstance(result.exception, errors.ArchitectureMismatch)
    assert str(result.exception).startswith(f"original: found no weights of {NAME} that timm can download; expected")


# Images by a path


def test_a_folder_of_images_has_no_labels(photos: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        shutil.copy(path, tmp_path / f"{number:02d}.png")
    (tmp_path / "licence.txt").write_text("ours")
    flat, classes = images_at(tmp_path, ToTensor()), images_at(photos, ToTensor())
    assert len(flat) == 12 and all(torch.equal(flat[i], classes[i][0]) for i in range(12))
    (tmp_path / "a class").mkdir()
    with pytest.raises(errors.InvalidArgument, match="expected a folder of images, or with one subfolder of them per"):
        images_at(tmp_path, ToTensor())


def test_a_hugging_face_dataset_on_disk(photos: Path, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    files = sorted(photos.rglob("*.png"))
    rows = {"image": [str(path) for path in files], "label": [int(path.parent.name[-1]) for path in files]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select(range(4))}).save_to_disk(tmp_path / "split")
    folder = images_at(photos, ToTensor())
    for found in (images_at(tmp_path / "plain", ToTensor()), images_at(tmp_path / "split", ToTensor())):
        assert len(found) == 12 and found.classes == ["a", "b", "c"]
        assert all(torch.equal(found[i][0], folder[i][0]) and found[i][1] == folder[i][1] for i in range(12))
    assert len(images_at(tmp_path / "split", ToTensor(), "val")) == 4
    unlabelled = data.remove_columns("label")
    unlabelled.save_to_disk(tmp_path / "unlabelled")
    assert torch.equal(images_at(tmp_path / "unlabelled", ToTensor())[3], folder[3][0])
    data.remove_columns("image").save_to_disk(tmp_path / "blind")
    with pytest.raises(
        errors.InvalidArgument, match=r"blind: found columns label; expected an image column \(image, im"
    ):
        images_at(tmp_path / "blind", ToTensor())
    datasets.DatasetDict({"unseen": data}).save_to_disk(tmp_path / "odd")
    with pytest.raises(
        errors.InvalidArgument, match=r"odd: found splits unseen; expected a split train\. Pass the split"
    ):
        images_at(tmp_path / "odd", ToTensor())


def test_a_dataset_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision
    from torchvision.datasets import FakeData

    class Digits(FakeData):
        def __init__(self, root: str, train: bool = True, transform: Any = None) -> None:
            super().__init__(12 if train else 4, (3, 8, 8), 3, transform)

    monkeypatch.setattr(torchvision.datasets, "Digits", Digits, raising=False)
    assert len(images_at(f"torch/Digits:{tmp_path}", ToTensor())) == 12
    assert len(images_at(f"torch/Digits:{tmp_path}", ToTensor(), "val")) == 4
