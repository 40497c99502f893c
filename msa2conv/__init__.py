"""msa2conv: turn a trained Vision Transformer into a cheaper MSA/conv hybrid at an exact FLOPs budget.

Importing this package loads neither timm, fvcore, torch_pruning nor scipy; they come with the function that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors, spvit as spvit, testing as testing
    from .adapters.base import Adapter as Adapter, find_sites as find_sites
    from .api import (
        Conversion as Conversion,
        calibrate as calibrate,
        choose as choose,
        convert as convert,
        make_plan as make_plan,
    )
    from .conversion import write_report as write_report
    from .cost import CostModel as CostModel
    from .exporting import export_onnx as export_onnx, export_program as export_program
    from .flops import count_flops as count_flops
    from .folding import fold_norms as fold_norms, streamline as streamline
    from .gate_search import Search as Search, prepare as prepare
    from .gate_training import train_gates as train_gates
    from .inspection import discover as discover, inspect as inspect
    from .laws import verify as verify
    from .layouts import Layout as Layout
    from .levers import (
        FFN as FFN,
        LinearFFN as LinearFFN,
        MergeInSite as MergeInSite,
        MergeTokens as MergeTokens,
        Mixer as Mixer,
        ThinAttention as ThinAttention,
        Width as Width,
    )
    from .observation import observe as observe
    from .options import Option as Option
    from .plan import Plan as Plan
    from .search.calibration import Calibration as Calibration
    from .search.gates import Gates as Gates
    from .search.solve import solve as solve
    from .sites import AttentionSite as AttentionSite, Claims as Claims, FFNSite as FFNSite
    from .storage import load as load, read_plan as read_plan, save as save
    from .tradeoff import Sweep as Sweep, sweep as sweep
    from .train.distill import distill as distill
    from .train.finetune import finetune as finetune
    from .train.head import reset_head as reset_head
    from .train.stages import Stage as Stage
    from .transforms.apply import apply as apply
    from .transforms.lift import lift as lift

__version__ = "0.1.0"

_WHERE = {
    "Adapter": "adapters.base",
    "AttentionSite": "sites",
    "Calibration": "search.calibration",
    "Claims": "sites",
    "Conversion": "api",
    "CostModel": "cost",
    "FFN": "levers",
    "FFNSite": "sites",
    "Layout": "layouts",
    "LinearFFN": "levers",
    "MergeInSite": "levers",
    "MergeTokens": "levers",
    "Mixer": "levers",
    "ThinAttention": "levers",
    "Width": "levers",
    "Gates": "search.gates",
    "Option": "options",
    "Plan": "plan",
    "Search": "gate_search",
    "Stage": "train.stages",
    "Sweep": "tradeoff",
    "apply": "transforms.apply",
    "calibrate": "api",
    "choose": "api",
    "convert": "api",
    "count_flops": "flops",
    "distill": "train.distill",
    "discover": "inspection",
    "export_onnx": "exporting",
    "export_program": "exporting",
    "find_sites": "adapters.base",
    "finetune": "train.finetune",
    "fold_norms": "folding",
    "inspect": "inspection",
    "lift": "transforms.lift",
    "load": "storage",
    "make_plan": "api",
    "observe": "observation",
    "prepare": "gate_search",
    "read_plan": "storage",
    "reset_head": "train.head",
    "save": "storage",
    "solve": "search.solve",
    "streamline": "folding",
    "sweep": "tradeoff",
    "train_gates": "gate_training",
    "verify": "laws",
    "write_report": "conversion",
}
_MODULES = ("errors", "spvit", "testing")
__all__ = ["__version__", *_MODULES, *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
