"""Hybrids on the Hugging Face Hub (the only importer of huggingface_hub)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import InvalidCheckpoint

_FILES = ("*.safetensors", "*.json")  # figures and page are for people: they are not downloaded


def upload(save: Callable[[Path], Any], repo_id: str, **options: Any) -> str:
    """Push what `save` writes into a folder as one commit; see `huggingface_hub.ModelHubMixin.push_to_hub`."""
    from huggingface_hub import ModelHubMixin

    class Hybrid(ModelHubMixin, library_name="msa2conv"):
        def _save_pretrained(self, save_directory: Path) -> None:
            save(save_directory)

    return str(Hybrid().push_to_hub(repo_id, **options))


def fetched(repo_or_folder: str | os.PathLike[str], **options: Any) -> Path:
    """The folder of a hybrid: itself where it lies on this machine, else downloaded; see `snapshot_download`.

    Raises:
        InvalidCheckpoint: there is neither such a folder nor such a repository, or it cannot be reached.
    """
    path = Path(repo_or_folder)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(repo_or_folder), allow_patterns=list(_FILES), **options))
    except Exception as error:  # what the hub raises is many things: no such name, no access, no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidCheckpoint(
            str(repo_or_folder),
            f"neither a folder here nor a repository that can be read ({reason})",
            "a folder written by Conversion.save, or a repository on the Hugging Face Hub such as 'me/deit_s_70'",
            "Check the name; for a private one log in with `hf auth login`, offline pass local_files_only=True.",
        ) from error


__all__ = ["fetched", "upload"]
