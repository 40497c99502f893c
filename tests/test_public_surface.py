"""What `import msa2conv` promises. A change here is a change that users see: it belongs into the release notes."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import msa2conv

NAMES = [
    "Adapter",
    "AttentionSite",
    "Calibration",
    "Claims",
    "Conversion",
    "CostModel",
    "FFN",
    "FFNSite",
    "Gates",
    "Layout",
    "LinearFFN",
    "MergeInSite",
    "MergeTokens",
    "Mixer",
    "Option",
    "Plan",
    "Search",
    "Stage",
    "Sweep",
    "ThinAttention",
    "Width",
    "__version__",
    "apply",
    "calibrate",
    "choose",
    "convert",
    "count_flops",
    "discover",
    "distill",
    "errors",
    "export_onnx",
    "export_program",
    "find_sites",
    "finetune",
    "fold_norms",
    "inspect",
    "lift",
    "load",
    "make_plan",
    "observe",
    "prepare",
    "read_plan",
    "reset_head",
    "save",
    "solve",
    "spvit",
    "streamline",
    "sweep",
    "testing",
    "train_gates",
    "verify",
    "write_report",
]
OBJECTS = [name for name in NAMES if name not in ("__version__", "errors", "spvit", "testing")]


def test_the_names() -> None:
    assert sorted(msa2conv.__all__) == NAMES
    assert sorted(dir(msa2conv)) == NAMES
    assert msa2conv.__version__.count(".") == 2


@pytest.mark.parametrize("name", OBJECTS)
def test_every_name_is_a_documented_function_or_class(name: str) -> None:
    """Asked twice: importing a submodule of the same name must not shadow the function."""
    for _ in range(2):
        found = getattr(msa2conv, name)
        assert inspect.isfunction(found) or inspect.isclass(found)
        assert found.__name__ == name and len(inspect.getdoc(found) or "") > 20


def test_every_error_is_documented_and_derives_from_one_base() -> None:
    kinds = [kind for kind in vars(msa2conv.errors).values() if inspect.isclass(kind)]
    assert len(kinds) > 15 and all(issubclass(kind, msa2conv.errors.Msa2ConvError) and kind.__doc__ for kind in kinds)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        msa2conv.prune  # noqa: B018


@pytest.mark.parametrize("first", ["", "import msa2conv.api", "from msa2conv import convert, load"])
def test_star_import_gives_the_same_objects_whatever_came_before(first: str) -> None:
    code = f"{first}\nfrom msa2conv import *\nassert all(map(callable, [{', '.join(OBJECTS)}]))"
    subprocess.run([sys.executable, "-c", code], check=True)
