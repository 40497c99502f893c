"""The authors' files: how they are read without unpickling, which of their forms they hold, and their names."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ArchitectureMismatch, InvalidArgument, InvalidCheckpoint
from ..files import read_state_dict, state_dict_in
from ..sites import Claims
from .recipe import Family

Form = Literal["search", "fine-tune", "merged"]
Source = str | os.PathLike[str] | Mapping[str, Any]
_KEYS = ("model", "state_dict")  # their training code also keeps an average, which they do not evaluate
_BLOCKS = {"deit": "blocks.", "swin": "layers."}
_TITLES = {"deit": "DeiT", "swin": "Swin"}
# Constants that PyTorch can compute again, and what a block of one kind does not need from another.
_IGNORED = ("attn_mask", "attn.relative_position_index", "mlp.assigned_indicator_index")
_UNUSED = ("attn.qk.", "attn.v.", "attn.proj.", "attn.head_probs", "attn.bn_1x1.", "attn.bn_3x3.", "attn.relative_")
# What their training files hold beside tensors. A yacs config is a dict, and read as one: none of its code is run.
_HARMLESS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
# The authors' convolution is a Sequential(Conv2d, BatchNorm2d, ReLU, Conv2d).
MERGED = {"reduce": "bconv.0", "norm": "bconv.1", "expand": "bconv.3"}


def family_of(claims: Claims) -> Family:
    """Whose names and conventions a model has: windows are Swin's."""
    return "swin" if any(site.layout.window is not None for site in claims.attentions) else "deit"


def theirs(name: str, family: Family) -> str:
    """timm's name of a tensor -> the authors'. Their patch merging closes a stage, timm's opens the next one."""
    if family == "deit":
        return name
    if name.startswith("layers.") and ".downsample." in name:
        _, stage, rest = name.split(".", 2)
        return f"layers.{int(stage) - 1}.{rest}"
    return "head." + name.removeprefix("head.fc.") if name.startswith("head.fc.") else name


class Checkpoint:
    """The tensors of an authors' file, taken by name; everything wrong is collected for one message.

    Args:
        source: a path (.pth, .safetensors), a state dict, or a dict that holds one under "model" or "state_dict".
        family: of the model that it is meant for.

    Attributes:
        form: "search" (thresholds), "fine-tune" (V, proj and head mixture) or "merged" (convolutions).

    Raises:
        InvalidArgument: neither of these.
        InvalidCheckpoint: not a file, would have to be unpickled, or none of the three forms.
        ArchitectureMismatch: of the other family.
    """

    def __init__(self, source: Source, family: Family) -> None:
        self.where, self.family = _name(source), family
        self.state = _read(source, self.where)
        self._taken: set[str] = set()
        self._missing: dict[str, tuple[int, ...]] = {}
        self._misfits: dict[str, tuple[int, ...]] = {}
        self._check_family()
        self.form = self._form()

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name; zeros of this shape where it is missing or has another one (see `check`)."""
        found = self.state.get(name)
        self._taken.add(name)
        if found is not None and found.shape == shape:
            return found
        if found is None:
            self._missing[name] = shape
        else:
            self._misfits[name] = shape
        return torch.zeros(shape)

    def check(self, claims: Claims) -> None:
        """Raise unless everything taken was there and nothing else is left.

        Raises:
            ArchitectureMismatch: tensors of other shapes.
            InvalidCheckpoint: missing or unknown keys.
        """
        if self._misfits:
            found = ", ".join(f"{name} {tuple(self.state[name].shape)}" for name in _first(self._misfits))
            raise ArchitectureMismatch(
                self.where, found + _others(self._misfits), _shapes(self._misfits) + " for this model",
                "Build the model with the width, depth, classes and image size that the checkpoint was trained with.",
            )  # fmt: skip
        unknown = [name for name in self.state if name not in self._taken and not self._harmless(name, claims)]
        if self._missing or unknown:
            found = f"no {', '.join(_first(self._missing))}" + _others(self._missing) if self._missing else ""
            extra = f"unknown keys {', '.join(_first(unknown))}" + _others(unknown) if unknown else ""
            wanted = f" with {_shapes(self._missing)}" if self._missing else ""
            raise InvalidCheckpoint(
                self.where, "; ".join(filter(None, (found, extra))),
                f"the tensors of a {_TITLES[self.family]} in SPViT's {self.form} form{wanted}",
                "Build the model that the checkpoint was trained from, and read the file whole.",
            )  # fmt: skip

    def _harmless(self, name: str, claims: Claims) -> bool:
        blocks = {site.block for site in claims.sites}
        inner = next((name[len(block) + 1 :] for block in blocks if name.startswith(f"{block}.")), None)
        return inner is not None and (inner in _IGNORED or inner.startswith(_UNUSED))

    def _check_family(self) -> None:
        other: Family = "deit" if self.family == "swin" else "swin"
        blocks = [name for name in self.state if name.startswith(_BLOCKS[other])]
        if blocks and not any(name.startswith(_BLOCKS[self.family]) for name in self.state):
            raise ArchitectureMismatch(
                self.where, f"a {_TITLES[other]} checkpoint ({', '.join(_first(blocks))})",
                f"a {_TITLES[self.family]} checkpoint ({_BLOCKS[self.family]}0...), as the model is one",
                f"Give a {_TITLES[other]} of timm's as the model.",
            )  # fmt: skip

    def _form(self) -> Form:
        def any_has(*parts: str) -> bool:
            return any(part in name for name in self.state for part in parts)

        if any_has(".attn.kernel_thresholds"):
            return "search"
        if any_has(".attn.bconv."):
            return "merged"
        if any_has(".attn.qk.", ".attn.head_probs"):
            return "fine-tune"
        dense = [name for name in self.state if ".attn.qkv." in name]
        kind = "a dense checkpoint" if dense else "keys"
        raise InvalidCheckpoint(
            self.where, f"{kind} ({', '.join(_first(dense or self.state)) or 'none'})",
            "SPViT's search, fine-tune or merged form (attn.kernel_thresholds, attn.qk or attn.bconv)",
            "Load a dense checkpoint with model.load_state_dict, and apply msa2conv.spvit.plan to the model.",
        )  # fmt: skip


def _name(source: Source) -> str:
    return "state_dict" if isinstance(source, Mapping) else str(source)


def _read(source: Source, where: str) -> dict[str, Tensor]:
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise InvalidArgument(
            "source", type(source).__name__, "a path, or a state dict {name: tensor}", "Pass the .pth file itself."
        )
    if isinstance(source, Mapping):
        state = state_dict_in(dict(source), where, _KEYS)
    else:
        with torch.serialization.safe_globals(_HARMLESS):
            state = read_state_dict(source, _KEYS)
    values = {name: value.detach().cpu() for name, value in state.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in values.items()}


def _first(names: Iterable[str]) -> list[str]:
    return list(names)[:3]


def _others(names: Iterable[str]) -> str:
    count = len(list(names)) - 3
    return f" and {count} more" if count > 0 else ""


def _shapes(wanted: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {wanted[name]}" for name in _first(wanted))
