"""Hybrids on the Hugging Face Hub, which is a local folder here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from models import images, vit

import msa2conv
from msa2conv import Conversion, errors


@pytest.fixture(scope="module")
def result() -> Conversion:
    return msa2conv.convert(vit(), 0.7, data=images(), progress=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for every repository, behind the functions that would go to the network."""

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
        return f"{repo_id}@{options['commit_message']}"

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        if not (tmp_path / repo_id).is_dir():
            raise OSError(f"no repository {repo_id}\nand more")
        shutil.copytree(
            tmp_path / repo_id,
            tmp_path / "cache",
            ignore=lambda folder, names: [
                name for name in names if not any(Path(name).match(pattern) for pattern in allow_patterns)
            ],
        )
        return str(tmp_path / "cache")

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path


def test_what_was_pushed_comes_back(result: Conversion, hub: Path) -> None:
    assert result.push_to_hub("me/tiny", commit_message="first") == "me/tiny@first"
    assert {path.name for path in (hub / "me/tiny").iterdir()} >= {"model.safetensors", "plan.json", "report.html"}
    again = Conversion.from_pretrained("me/tiny", vit())
    assert again.plan == result.plan and again.report == result.report
    x = images()[:4]
    assert torch.equal(again.model(x), result.model(x))
    assert not (hub / "cache" / "figures").exists()  # pictures are not needed to run it


def test_the_card_is_one_that_the_hub_reads(result: Conversion, hub: Path) -> None:
    result.push_to_hub("me/tiny", commit_message="first")
    card = huggingface_hub.ModelCard.load(hub / "me/tiny" / "README.md")
    assert card.data.library_name == "msa2conv" and card.data.pipeline_tag == "image-classification"
    assert "vision-transformer" in card.data.tags and str(result.plan) in card.text


def test_a_folder_needs_no_hub(result: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    result.save(tmp_path / "out")
    assert Conversion.from_pretrained(tmp_path / "out", vit()).plan == result.plan


def test_an_unknown_name_is_refused(hub: Path) -> None:
    with pytest.raises(errors.InvalidCheckpoint) as raised:
        Conversion.from_pretrained("me/none")
    assert str(raised.value) == (
        "me/none: found neither a folder here nor a repository that can be read (no repository me/none); expected a "
        "folder written by Conversion.save, or a repository on the Hugging Face Hub such as 'me/deit_s_70'. Check the "
        "name; for a private one log in with `hf auth login`, offline pass local_files_only=True."
    )
