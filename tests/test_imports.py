"""Imports run one way, and heavy packages have one importer each."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import msa2conv

ROOT = Path(msa2conv.__file__).parent

# A module may import modules of a lower rank, and modules of its own rank. The longest matching prefix counts.
RANKS = [
    ("errors", "progress"),
    ("layouts", "standin", "stopwatch", "observation"),
    ("ops",),
    ("kernels", "merging"),
    ("stream",),
    ("plan", "files"),
    ("hub", "sharing"),
    ("transforms.apply", "options", "targets"),
    ("settings",),
    ("storage",),
    ("sites",),
    ("transforms",),
    ("adapters",),
    ("workbench", "data"),
    ("flops",),
    ("cost",),
    ("levers",),
    ("search",),
    ("report", "verify", "laws", "locality", "evaluate", "planning"),
    ("latency",),
    ("train",),
    ("conversion", "inspection"),
    ("exporting",),
    ("train.lessons", "train.trainer", "train.finetune", "train.head", "folding"),
    ("gate_search", "gate_training"),
    ("spvit",),
    ("api",),
    ("train.run_recipe", "tradeoff"),
    ("testing",),
    ("cli", "__main__"),
]
ALLOWED = {("storage", "adapters.build")}  # load() rebuilds the base model where the Plan knows how
ONLY_IN = {
    "fvcore": ("flops",),
    "torch_pruning": ("transforms.groups",),
    "timm": ("adapters", "train"),
    "accelerate": ("train",),
    "scipy": ("search.solve",),
    "torchvision": ("data",),
    "PIL": ("data",),
    "safetensors": ("files",),
    "tqdm": ("progress",),
    "typer": ("cli", "__main__"),
    "rich": ("cli", "__main__"),
    "datasets": ("data",),
    "yaml": ("train",),
    "onnx": ("exporting",),
    "onnxruntime": ("exporting",),
    "huggingface_hub": ("sharing",),
    "matplotlib": ("report.plots",),
    "jinja2": ("report.page",),
}


def modules() -> dict[str, str]:
    """{dotted name below msa2conv: source}; packages by their own name, the package itself as ""."""
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in ROOT.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): path.read_text() for path, parts in names.items()}


@cache
def import_nodes(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imports(name: str, source: str, known: set[str]) -> set[str]:
    """Everything that a module imports, functions included: 'msa2conv.<name>' or the top-level package."""
    package = name if any(other.startswith(name + ".") for other in known) else name.rpartition(".")[0]
    found: set[str] = set()
    for node in import_nodes(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            base = node.module or ""
            if node.level:
                above = ["msa2conv", *package.split(".")] if package else ["msa2conv"]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            inner = base.removeprefix("msa2conv").removeprefix(".")
            modules_in_it = {f"{inner}.{alias.name}".strip(".") for alias in node.names} & known
            if base.split(".")[0] == "msa2conv" and modules_in_it:
                found |= {f"msa2conv.{module}" for module in modules_in_it}
            else:
                found.add(base)
    return {item if item.startswith("msa2conv") else item.split(".")[0] for item in found}


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rank(name: str) -> int:
    matching = [(len(prefix), level) for level, group in enumerate(RANKS) for prefix in group if below(name, prefix)]
    assert matching, f"{name} has no rank: add it to RANKS"
    return max(matching)[1]


def offences(sources: dict[str, str]) -> list[str]:
    found = []
    for name, source in sources.items():
        if not name:
            continue  # the package itself hands out names lazily
        for target in sorted(imports(name, source, set(sources))):
            inner = target.removeprefix("msa2conv").removeprefix(".")
            if target.split(".")[0] == "msa2conv":
                if inner and (name, inner) not in ALLOWED and rank(inner) > rank(name):
                    found.append(f"{name} imports {inner}, which stands above it")
            elif target in ONLY_IN and not any(below(name, prefix) for prefix in ONLY_IN[target]):
                found.append(f"{name} imports {target}, which only {' and '.join(ONLY_IN[target])} may")
    return found


def test_imports_run_one_way() -> None:
    assert offences(modules()) == []


def test_every_package_with_one_importer_is_imported_there() -> None:
    sources = modules()
    used = {package: {n for n, s in sources.items() if package in imports(n, s, set(sources))} for package in ONLY_IN}
    assert all(used[package] for package in ("fvcore", "torch_pruning", "timm", "scipy", "torchvision", "safetensors"))


@pytest.mark.parametrize(
    ("name", "line", "offence"),
    [
        ("layouts", "from .ops import IO", "layouts imports ops, which stands above it"),
        ("storage", "from .sites import Site", "storage imports sites, which stands above it"),
        ("sites", "def f():\n    from .api import convert", "sites imports api, which stands above it"),
        ("sites", "from . import cost", "sites imports cost, which stands above it"),
        (
            "transforms.lift",
            "from ..adapters import declared",
            "transforms.lift imports adapters.declared, which stands above it",
        ),
        (
            "levers.mixer",
            "from msa2conv.search import solve",
            "levers.mixer imports search.solve, which stands above it",
        ),
        ("search.solve", "import msa2conv.api", "search.solve imports api, which stands above it"),
        ("storage", "from .adapters.declared import x", "storage imports adapters.declared, which stands above it"),
        ("api", "import timm.layers", "api imports timm, which only adapters and train may"),
        ("levers.ffn", "def f():\n    import scipy", "levers.ffn imports scipy, which only search.solve may"),
        ("api", "from fvcore.nn import x", "api imports fvcore, which only flops may"),
    ],
)
def test_the_check_can_fail(name: str, line: str, offence: str) -> None:
    sources = modules()
    assert offences({**sources, name: f"{sources[name]}\n{line}\n"}) == [offence]


def test_a_module_without_a_rank_is_noticed() -> None:
    with pytest.raises(AssertionError, match="gadgets has no rank"):
        offences({**modules(), "gadgets": "from .errors import Msa2ConvError"})


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return {name.split(".")[0] for name in output.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"timm", "fvcore", "torch_pruning", "scipy", "torchvision", "torch", "numpy", "pydantic"}
    assert not heavy & loaded_after("import msa2conv; msa2conv.__version__; dir(msa2conv)")
    assert heavy <= loaded_after("import " + ", ".join(sorted(heavy)))


def test_reading_a_file_loads_only_what_it_needs() -> None:
    loaded = loaded_after("from msa2conv import load, read_plan, save, apply, Layout, Plan")
    assert "safetensors" in loaded and "pydantic" in loaded
    assert not {"timm", "fvcore", "torch_pruning", "scipy", "torchvision"} & loaded
