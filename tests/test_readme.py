"""What the documents show runs: every Python block of README.md, CONTRIBUTING.md and the examples, and all doctests.

A block runs in a temporary folder beside a link to `examples/`, in the namespace of the blocks above it in its file.
timm's models are stood in for by small ones of the same name with random weights. A block below
`<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import doctest
import functools
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from clock import Clock, use

import msa2conv

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *(path for path in [ROOT / "CONTRIBUTING.md"] if path.exists()),
    *sorted((ROOT / "examples").glob("**/README.md")),
    ROOT / "recipes" / "README.md",
    ROOT / "docs" / "levers.md",
]
BLOCK = re.compile(
    r"(?P<not_run><!-- not run: \S[^>]* -->\s*)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SMALL = {
    "swin": {"embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6)},
    "vit": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "deit_small": {"embed_dim": 48, "depth": 2, "num_heads": 3},
}
MODULES = [module.name for module in pkgutil.walk_packages(msa2conv.__path__, "msa2conv.")]


def blocks(text: str) -> list[tuple[int, str, bool]]:
    """[(line, code, whether it is to be run)]."""
    return [
        (text.count("\n", 0, match.start("code")), match["code"], match["not_run"] is None)
        for match in BLOCK.finditer(text)
    ]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No downloads, small models, few images and steps, and a clock that no busy machine disturbs."""
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        return create(name, **kwargs, **next((size for kind, size in SMALL.items() if kind in name), {}))

    def briefly(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "distill_steps" in kwargs:
                kwargs["distill_steps"] = min(2, kwargs["distill_steps"])
            return function(*args, **{"images": 16, **kwargs})

        return call

    use(monkeypatch, Clock())
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(msa2conv, "convert", briefly(msa2conv.convert))
    monkeypatch.setattr(msa2conv, "calibrate", briefly(msa2conv.calibrate))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_ins: None) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("examples", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code, to_run in blocks(document.read_text()):
        if to_run:
            exec(compile("\n" * line + code, str(document), "exec"), namespace)


def test_the_readme_shows_python_that_runs() -> None:
    assert any(to_run and "convert(" in code for _, code, to_run in blocks((ROOT / "README.md").read_text()))


def test_blocks_are_found_and_exempted() -> None:
    python, shell = "```python\nx\n```\n", "```sh\nls\n```\n"
    text = "# A\n" + python + "<!-- not run: downloads -->\n" + python + shell + python
    assert blocks(text) == [(2, "x\n", True), (6, "x\n", False), (12, "x\n", True)]
    assert blocks("<!-- not run: -->\n```python\n1\n```\n")[0][2]  # a reason must be given


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_doctests(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


def test_there_are_doctests() -> None:
    finder = doctest.DocTestFinder()
    examples = [test.examples for name in ("layouts", "flops", "targets") for test in finder.find(module(name))]
    assert sum(map(len, examples)) >= 5


def module(name: str) -> Any:
    return importlib.import_module(f"msa2conv.{name}")


def test_tables_show_what_the_result_files_say() -> None:
    table = [sys.executable, "-m", "benchmarks.table", "--check"]
    result = subprocess.run(table, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
