"""The command line: its commands on a small timm model, and what it says when something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from clock import Clock, use
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from msa2conv import api, errors
from msa2conv.cli import app
from msa2conv.files import read_tensors
from msa2conv.plan import weights_sha256
from msa2conv.report.evaluation import Evaluation
from msa2conv.search import calibrate
from msa2conv.search.measure import distance

NAME = "test_vit"  # timm's own for tests: six blocks of width 64, 160 x 160
WRITTEN = {"model.safetensors", "plan.json", "report.json", "report.html", "figures", "README.md"}
CONVERT = ["convert", NAME, "--flops"]
run = CliRunner().invoke
pytestmark = pytest.mark.xdist_group("cli")  # on one worker, so that what they share is made once


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are cut to the terminal's width: make that the same everywhere."""
    monkeypatch.setattr("msa2conv.cli.shown.console", Console(width=160))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of three classes and nine photos of noise."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for index in range(9):
        folder = root / f"class{index % 3}"
        folder.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def command(photos: Path, checkpoint: Path, out: Path) -> list[str]:
    options = ["--flops", "70%", "--checkpoint", checkpoint, "--images", photos, "-n", 8, "--lever", "ffn", "-o", out]
    return ["convert", NAME, *map(str, options), "--no-progress"]


@pytest.fixture(scope="module")
def converted(photos: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("cli") / "out"
    result = run(app, command(photos, checkpoint, out))
    assert result.exit_code == 0, result.output
    return out, result.output


def test_inspect_shows_sites_floor_and_ceiling() -> None:
    result = run(app, ["inspect", "vit_tiny_patch16_224"])
    assert result.exit_code == 0
    assert "1.258 GFLOPs (multiply-adds, batch 1)" in result.output
    assert "blocks.11.attn" in result.output and "reachable:" in result.output


def test_convert_writes_the_folder_and_prints_the_plan(converted: tuple[Path, str]) -> None:
    out, text = converted[0], " ".join(converted[1].split())
    assert {path.name for path in out.iterdir()} == WRITTEN
    assert "ffn" in text and "(69." in text and "msa2conv eval" in text


def test_interrupted_the_same_command_continues(
    converted: tuple[Path, str], photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Ctrl-C while options are scored; what comes out in the end is what an uninterrupted run writes."""
    out, measured = tmp_path / "out", []

    def measure(*args: Any) -> float:
        measured.append(distance(*args))
        if len(measured) == 40:
            raise KeyboardInterrupt
        return measured[-1]

    arguments = command(photos, checkpoint, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "distance", measure)
        result = run(app, arguments)
        assert result.exit_code != 0
        assert f"interrupted: the same command continues with what {out}/calibrating/ holds\n" in result.output
        assert [path.name for path in out.iterdir()] == ["calibrating"]
        result = run(app, arguments)
        assert result.exit_code == 0, result.output
    assert len(measured) == 6 * (2 + 7) + 1  # two for a prefix weight, seven widths; the interrupted one twice
    assert {path.name for path in out.iterdir()} == WRITTEN
    assert (out / "plan.json").read_bytes() == (converted[0] / "plan.json").read_bytes()
    (mine, my_header), (other, other_header) = (read_tensors(at / "model.safetensors") for at in (out, converted[0]))
    assert my_header == other_header and mine.keys() == other.keys()  # entries of a header come in any order
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_sweep_plans_many_budgets_and_leaves_what_convert_needs_for_any(
    converted: tuple[Path, str], photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    swept, out = tmp_path / "swept", tmp_path / "out"
    arguments = command(photos, checkpoint, swept)
    result = run(app, ["sweep", *arguments[1:], "--flops", "0.9"])
    assert result.exit_code == 0, result.output
    assert {path.suffix for path in swept.iterdir()} == {".json", ".png", ".safetensors"}
    assert "same class" in result.output
    assert f"next: msa2conv convert {NAME} --flops 70% --calibration {swept}/calibration.safetensors" in result.output
    own = command(photos, checkpoint, out)
    result = run(app, [*own, "--calibration", str(swept / "calibration.safetensors")])
    assert result.exit_code == 0, result.output
    for path in (out / "plan.json", swept / "plan_0.7000.json"):
        assert path.read_bytes() == (converted[0] / "plan.json").read_bytes()


def test_a_budget_of_time(photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Clock())
    arguments = command(photos, checkpoint, tmp_path / "out")
    arguments[arguments.index("--flops") : arguments.index("--flops") + 2] = ["--latency", "80%", "--batch-size", "2"]
    result = run(app, [*arguments, "--timetable", str(tmp_path / "times.json")])
    assert result.exit_code == 0, result.output
    assert "ms, batch 2, float32" in result.output and (tmp_path / "times.json").is_file()


def test_the_same_command_means_the_same_random_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[str] = []

    def convert(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        given.append(weights_sha256(model))
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "convert", convert)
    for seed in ("0", "0", "1"):
        run(app, [*CONVERT, "0.7", "--no-pretrained", "-o", str(tmp_path), "--seed", seed])
    assert given[0] == given[1] != given[2]


def test_export_writes_files_and_says_how_they_were_checked(converted: tuple[Path, str], tmp_path: Path) -> None:
    onnx, program = tmp_path / "hybrid.onnx", tmp_path / "hybrid.pt2"
    result = run(app, ["export", str(converted[0]), "--onnx", str(onnx), "--program", str(program)])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert f"{onnx}: {onnx.stat().st_size / 1e6:.1f} MB; onnxruntime " in text and f"{program}: " in text
    assert text.count("on 8 images") == 2


def test_export_streamlines_unless_told_not_to(
    converted: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamlined: list[Any] = []
    monkeypatch.setattr("msa2conv.cli.streamline", lambda hybrid: streamlined.append(hybrid) or hybrid)
    monkeypatch.setattr("msa2conv.cli.export_program", lambda *given, **more: "written")
    command = ["export", str(converted[0]), "--program", str(tmp_path / "hybrid.pt2")]
    for more, count in (["--as-it-is"], 0), ([], 1):
        assert run(app, [*command, *more]).exit_code == 0
        assert len(streamlined) == count


def test_eval_puts_the_original_beside_the_hybrid(converted: tuple[Path, str], photos: Path, checkpoint: Path) -> None:
    out, _ = converted
    result = run(app, ["eval", str(out), "--images", str(photos), "--original", str(checkpoint), "--no-progress"])
    assert result.exit_code == 0, result.output
    assert "original" in result.output and "hybrid" in result.output and "/9)" in result.output
    assert "warning" not in result.output
    measured = Evaluation.from_json((out / "evaluation.json").read_text(), "evaluation.json")
    assert set(measured.models) == {"original", "hybrid"} and measured.models["hybrid"].images == 9
    percent = f"{100 * measured.models['hybrid'].correct / 9:.1f} %"
    assert f"<b>{percent}</b><span>top-1</span>" in (out / "report.html").read_text()


def test_report_draws_the_page_anew(converted: tuple[Path, str]) -> None:
    out, _ = converted
    (out / "report.html").unlink()
    result = run(app, ["report", str(out)])
    assert result.exit_code == 0 and f"written to {out / 'report.html'}" in result.output.replace("\n", "")
    assert (out / "report.html").is_file()


def test_eval_warns_of_other_weights(converted: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save(timm.create_model(NAME, num_classes=3).state_dict(), other)
    result = run(app, ["eval", str(converted[0]), "--images", str(photos), "--original", str(other), "--no-progress"])
    assert "holds other weights than those that were converted" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (["inspect", "vit_tinny_patch16_224"], errors.InvalidArgument, "perhaps vit_tiny_patch16_224"),
        ([*CONVERT, "2", "--no-pretrained", "-o", "OUT"], errors.InvalidTarget, "Did you mean '2%'"),
        (["convert", NAME, "--no-pretrained", "-o", "OUT"], errors.InvalidTarget, "flops_target, latency_target or"),
        ([*CONVERT, "0.7", "--no-pretrained", "--device", "abacus", "-o", "OUT"], errors.InvalidArgument, "'abacus' ("),
        ([*CONVERT, "0.7", "--checkpoint", "BAD", "-o", "OUT"], errors.InvalidCheckpoint, "keys that"),
        ([*CONVERT, "0.7", "--checkpoint", "none.pth", "-o", "OUT"], errors.InvalidCheckpoint, "no file"),
        ([*CONVERT, "0.7", "--no-pretrained", "-o", "FILE/out"], errors.InvalidOutputPath, "output path"),
        ([*CONVERT, "0.7", "-o", "out.safetensors"], errors.InvalidOutputPath, "a folder, which gets the hybrid"),
        (["eval", "nowhere", "--images", "x"], errors.InvalidCheckpoint, "no file"),
        (["export", "nowhere"], errors.InvalidArgument, "neither --onnx nor --program"),
        (["export", "nowhere", "--onnx", "x.onnx"], errors.InvalidCheckpoint, "no file"),
    ],
)  # fmt: skip
def test_mistakes_are_typed_errors(arguments: list[str], kind: type[Exception], text: str, tmp_path: Path) -> None:
    bad, file = tmp_path / "bad.pth", tmp_path / "file"
    torch.save({"something.weight": torch.zeros(1)}, bad)
    file.write_text("")
    places = {"OUT": str(tmp_path / "out"), "BAD": str(bad), "FILE/out": str(file / "out")}
    result = run(app, [places.get(argument, argument) for argument in arguments])
    assert isinstance(result.exception, kind), result.output
    assert text in str(result.exception)


def test_missing_pretrained_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **kwargs: object) -> object:
        if pretrained:
            raise OSError("cannot reach the hub")
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    result = run(app, ["convert", NAME, "--flops", "0.7", "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, errors.WeightsUnavailable)
    assert "cannot reach the hub" in str(result.exception)
    assert "pass --checkpoint FILE, or --no-pretrained for random weights" in str(result.exception)


def test_errors_end_in_one_line_and_exit_code_1() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "msa2conv", "inspect", "resnet18"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ResNet: found no attention module at all")
    assert "Traceback" not in result.stderr


def test_without_the_cli_extra_the_install_line_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; from msa2conv.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'msa2conv[cli]'" in result.stderr
