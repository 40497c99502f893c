"""The wheel: what is in it, and that it works where only it and its dependencies are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).parents[1]
CONVERT = """
import msa2conv, torch
from pathlib import Path
from timm.models.vision_transformer import VisionTransformer

assert Path(msa2conv.__file__).is_relative_to({installed!r}), msa2conv.__file__
torch.set_num_threads(1)
model = VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=5)
result = msa2conv.convert(model, 0.7, images=32)
assert "shipped with msa2conv" in result.report.calibration
result.save("hybrid.safetensors")
assert msa2conv.load("hybrid.safetensors", model)(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
print(result.plan)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the working tree."""
    source, dist = tmp_path_factory.mktemp("source") / "msa2conv", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", dist, cwd=source)
    (path,) = dist.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    assert {"msa2conv/py.typed", "msa2conv/data/photos.npz", "msa2conv/data/README.md"} <= package
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "msa2conv").rglob("*.py")}
    assert sources == {name for name in package if name.endswith(".py")}
    assert all(name.startswith("msa2conv/") for name in package)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata_state_version_licence_and_script(wheel: Path) -> None:
    import msa2conv

    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert f"Version: {msa2conv.__version__}\n" in texts["METADATA"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"] and "Requires-Python: >=3.10" in texts["METADATA"]
    assert "msa2conv = msa2conv.__main__:main" in texts["entry_points.txt"]


def test_the_installed_wheel_converts_a_model_anywhere(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, wheel, cwd=elsewhere)
    code = CONVERT.format(installed=str(installed))
    assert "GFLOPs" in run("-W", "ignore", "-c", code, cwd=elsewhere, PYTHONPATH=str(installed))
    assert [path.name for path in elsewhere.iterdir()] == ["hybrid.safetensors"]


def test_the_oldest_versions_tested_are_the_oldest_stated() -> None:
    """`make test-oldest` installs exactly the lower bounds that users are promised."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stated = [*project["dependencies"], *extras["cli"], *extras["train"], *extras["report"]]
    tested = [line for line in (ROOT / "tests/oldest.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line.replace("==", ">=") for line in tested] == stated
