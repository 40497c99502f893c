"""Methods: every module of this package may have a list METHODS; there is no other place to register one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from msa2conv.errors import InvalidArgument

from .base import Context, Method


@cache
def methods() -> dict[str, Method]:
    """{name: method} of all modules here."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {method.name: method for module in modules for method in getattr(module, "METHODS", ())}


def method_of(name: str) -> Method:
    """A known method; raises InvalidArgument."""
    if name not in methods():
        known = ", ".join(sorted(methods()))
        raise InvalidArgument("method", repr(name), known, "A new one is a file in benchmarks/methods.")
    return methods()[name]


__all__ = ["Context", "Method", "method_of", "methods"]
