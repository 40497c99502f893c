"""What Hugging Face transformers must be told about a hybrid: its `config` cannot describe it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from .errors import InvalidArgument
from .files import MODEL_FILE, write_json, write_tensors
from .plan import Plan

CONFIG_FILE = "config.json"
NOTE = (
    "this is a hybrid made by msa2conv, whose widths a config cannot describe; build the original architecture "
    "and call msa2conv.load(folder, model)"
)


def guard(hybrid: nn.Module, plan: Plan) -> None:
    """Let `save_pretrained` of a transformers model write what `msa2conv.load` reads and `from_pretrained` refuses.

    Left alone, `from_pretrained` would read such weights, warn, and go on with attentions that nobody trained.
    """
    if is_transformers(hybrid):
        hybrid.__dict__["save_pretrained"] = SavePretrained(hybrid, plan)


def is_transformers(model: nn.Module) -> bool:
    """Whether it is a model of transformers, which is not imported for that."""
    return any(kind.__module__ == "transformers.modeling_utils" for kind in type(model).__mro__)


class SavePretrained:
    """`save_pretrained` of a hybrid: its class's own, then the Plan beside the weights and a note in config.json."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        if kwargs.get("push_to_hub"):
            raise InvalidArgument(
                "push_to_hub", "save_pretrained(..., push_to_hub=True)", "a hybrid saved first",
                "Call hybrid.push_to_hub(name), which uploads the folder that was written whole.",
            )  # fmt: skip
        original: Any = type(self.model)
        original.save_pretrained(self.model, save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if (folder / MODEL_FILE).is_file():
            write_tensors(folder / MODEL_FILE, dict(self.model.state_dict()), self.plan.header)
        write_config(self.model, folder)


def write_config(model: nn.Module, folder: Path) -> None:
    """config.json of a transformers model, by which `AutoConfig` finds the original architecture again."""
    config: Any = model.config
    described = json.loads(config.to_json_string(use_diff=True))
    described |= {"architectures": [type(model).__name__], "transformers_weights": NOTE}
    write_json(folder / CONFIG_FILE, described)
