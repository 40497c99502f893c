"""A supernode: the host module, candidate branches beside it, and a gate that says which of them runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InvalidArgument
from ..standin import Standin

HOST = "host"


class Supernode(Standin):
    """Stands where its host stood; the host is wrapped, never copied.

    Args:
        host: the original attention or FFN.

    Example:
        >>> node = Supernode(nn.Identity())
        >>> node.add("doubled", nn.Linear(2, 2))
        >>> node.gate = "doubled"
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.branches = nn.ModuleDict()
        self._gate = HOST

    @property
    def gate(self) -> str:
        """The branch that runs: "host" or the name of a branch."""
        return self._gate

    @gate.setter
    def gate(self, name: str) -> None:
        if name != HOST and name not in self.branches:
            raise InvalidArgument(
                "gate", repr(name), f"one of {[HOST, *self.branches]}", "Add the branch before choosing it."
            )
        self._gate = name

    def add(self, name: str, branch: nn.Module) -> None:
        """Add a candidate; it follows the host's training mode."""
        self.branches[name] = branch.train(self.host.training)

    def remove(self, name: str) -> None:
        """Drop a candidate, so that only those in use take memory."""
        if self._gate == name:
            self._gate = HOST
        del self.branches[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.host if self._gate == HOST else self.branches[self._gate]
        return module(*args, **kwargs)
