"""timm models with weights: downloaded, or of a checkpoint."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidCheckpoint, Msa2ConvError, WeightsUnavailable
from ..files import read_state_dict
from ..plan import fingerprint
from .build import create


def downloaded(name: str, otherwise: str = "pass weights of your own", **kwargs: Any) -> nn.Module:
    """A timm model with its pretrained weights, in eval mode.

    Args:
        name: of the model.
        otherwise: what to do without a network, for the message.
        kwargs: of `timm.create_model`.

    Raises:
        InvalidArgument: no such name.
        WeightsUnavailable: there are none, or no network.
    """
    try:
        return create(name, pretrained=True, **kwargs).eval()
    except Msa2ConvError:
        raise
    except Exception as error:  # timm and its hub client raise many kinds when there is no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsUnavailable(
            name, f"no pretrained weights ({reason})", "weights that timm can download or has cached",
            f"Go online once, or {otherwise}.",
        ) from error  # fmt: skip


def from_checkpoint(name: str, path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """A timm model with weights from a file, in eval mode; with as many classes as they have.

    Raises:
        InvalidCheckpoint: no file, would have to be unpickled, or of another architecture.
    """
    state = read_state_dict(path)
    head = next((state[key] for key in ("head.weight", "head.fc.weight") if key in state), None)
    model = create(name, **({} if head is None else {"num_classes": len(head)}) | kwargs)
    fill(model, state, str(path))
    return model.eval()


def fill(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Put a whole state dict into a model, in its own dtypes; raises InvalidCheckpoint."""
    own = model.state_dict()
    wrong = [key for key in sorted(own.keys() | state.keys()) if key not in own or key not in state]
    wrong += [key for key in own if key in state and own[key].shape != state[key].shape]
    if wrong:
        raise InvalidCheckpoint(
            where, f"keys that do not fit {type(model).__name__}: {', '.join(wrong[:3])}",
            f"the {len(own)} tensors of this architecture (fingerprint {fingerprint(model)[:12]})",
            "Check the model name and the number of classes.",
        )  # fmt: skip
    model.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()})
