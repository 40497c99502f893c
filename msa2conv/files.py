"""Files, written atomically and read without unpickling: tensors, text, JSON."""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import InvalidCheckpoint, InvalidOutputPath

MODEL_FILE = "model.safetensors"


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return the path if a file can be created there (parents are made); raise InvalidOutputPath otherwise."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent):
            pass
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
    except OSError as error:
        raise InvalidOutputPath(
            str(path), error.strerror or str(error), "a path where a file can be written", "Choose another output path."
        ) from error
    return target


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it over `path` on success, delete it on failure.

    Raises:
        InvalidOutputPath: nothing can be created there, or the disk is full.
    """
    target = check_writable(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may find the new name on disk before the content
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise InvalidOutputPath(
            str(path), f"a file that could not be written whole ({error})", "a disk with room for it",
            "Free some space, or choose another output path.",
        ) from error  # fmt: skip
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(owned, temporary, metadata)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file -> (tensors, metadata); raises InvalidCheckpoint."""
    source = Path(path)
    if not source.is_file():
        raise InvalidCheckpoint(str(path), "no file", "a .safetensors file", "Check the path.")
    try:
        with safe_open(source, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        with source.open("rb") as file:
            head = file.read(8)  # of a safetensors file: the length of its header, below 2**32
        if zipfile.is_zipfile(source) or (head[:1] == b"\x80" and any(head[4:])):
            raise InvalidCheckpoint(
                str(path),
                "a pickle",
                "a .safetensors file",
                "Pickles can run code when read and are refused: save the state dict with safetensors.torch.save_file.",
            ) from error
        raise InvalidCheckpoint(
            str(path), f"a damaged or truncated file ({error})", "a .safetensors file", "Copy or write the file again."
        ) from error


STATE_KEYS = ("state_dict", "model_ema", "model")  # under which training code keeps its state dict, best first


def read_state_dict(path: str | os.PathLike[str], keys: tuple[str, ...] = STATE_KEYS) -> dict[str, Tensor]:
    """Read weights from .safetensors, or from .pth/.pt/.bin with `weights_only=True`; raises InvalidCheckpoint."""
    source = Path(path)
    if source.suffix == ".safetensors":
        return read_tensors(source)[0]
    if not source.is_file():
        raise InvalidCheckpoint(str(path), "no file", "a .safetensors or .pth file", "Check the path.")
    try:
        loaded: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # torch's own text advises to unpickle
        reason = f"it holds {named[1]}" if named else type(error).__name__
        raise InvalidCheckpoint(
            str(path),
            f"a file that cannot be read without unpickling ({reason})",
            "tensors only",
            "Unpickling can run code and is refused: save the plain state dict with safetensors.torch.save_file.",
        ) from error
    return state_dict_in(loaded, str(path), keys)


def state_dict_in(loaded: Any, where: str, keys: tuple[str, ...] = STATE_KEYS) -> dict[str, Tensor]:
    """The state dict in what training code saved: itself, or the first of `keys`; raises InvalidCheckpoint."""
    for key in keys:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InvalidCheckpoint(
            where,
            f"{type(loaded).__name__} with entries that are not tensors",
            "a state dict {name: tensor}, plain or under 'state_dict', 'model' or 'model_ema'",
            "Save model.state_dict() alone.",
        )
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def write_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors and plain numbers (a training state) atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a full disk is an OSError on a file object
        torch.save(state, file)


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_state` wrote, without unpickling anything but tensors and plain values."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise InvalidCheckpoint(
            str(path), f"a file that is not a saved training state ({type(error).__name__})", "one that msa2conv wrote",
            "Delete it to start anew.",
        ) from error  # fmt: skip


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
