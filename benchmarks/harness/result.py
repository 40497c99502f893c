"""One run's result: one JSON file, written whole or not at all."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from msa2conv.errors import InvalidCheckpoint
from msa2conv.files import write_json

RESULTS = Path(__file__).parents[1] / "results"
ROOT = Path(__file__).parents[2]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Quality(_Data):
    """Args:
    top1: percent of the test images.
    kl: mean KL of the answers to the parent's, nats.
    agreement: percent of test images on which both say the same.
    """

    top1: float
    kl: float
    agreement: float


class Speed(_Data):
    """Of a forward pass.

    Args:
        ratio: median over rounds of the time over the parent's in the same round.
        seconds, parent_seconds: medians.
        spread, parent_spread: interquartile range over the median.
    """

    ratio: float
    seconds: float
    spread: float
    parent_seconds: float
    parent_spread: float


class Name(_Data):
    """Which run: one method on one experiment with one budget and one seed."""

    tier: str
    experiment: str
    method: str
    budget: float
    seed: int

    @property
    def stem(self) -> str:
        return f"{self.method}-{self.budget:g}-s{self.seed}"

    def path(self, root: Path = RESULTS, failed: bool = False) -> Path:
        suffix = ".failed.json" if failed else ".json"
        return root / self.tier / self.experiment / f"{self.stem}{suffix}"


class Circumstances(_Data):
    """What is needed to repeat a run."""

    config: dict[str, Any]
    command: str
    versions: dict[str, str]
    device: str
    git: str


class Failure(_Data):
    """A run that its method or a rule refused."""

    name: Name
    error: str
    circumstances: Circumstances


class Result(_Data):
    """Args:
    name: which run.
    keeps_grid: the method's promise.
    in_time: whether it kept a budget of time, too, and so may have used less of that of FLOPs.
    flops, parent_flops: multiply-adds at batch 1 by msa2conv's counter.
    torch_flops: by torch.utils.flop_counter and 5 an element of a LayerNorm.
    parameters, parent_parameters: how many.
    blocks, parent_blocks: {block: multiply-adds}.
    parent: the parent itself on the test images.
    before, after: without training and with it; None without any.
    epochs_searched: of the epochs, those that the method spent itself.
    speed: {batch size: of the network that `after` is about}.
    batch_invariance: {figure: value} of the check.
    peak_memory_gib: most memory during the run.
    seconds: {stage: wall time}.
    plan: what was decided, of a method that says so.
    notes: what else the method says.
    """

    schema_version: Literal[1] = 1
    name: Name
    keeps_grid: bool
    in_time: bool = False
    flops: int
    parent_flops: int
    torch_flops: int
    parameters: int
    parent_parameters: int
    blocks: dict[str, int]
    parent_blocks: dict[str, int]
    parent: Quality
    before: Quality
    after: Quality | None
    epochs_searched: int
    speed: dict[int, Speed]
    batch_invariance: dict[str, float]
    peak_memory_gib: float | None
    seconds: dict[str, float]
    plan: dict[str, Any] | None
    notes: dict[str, Any]
    circumstances: Circumstances

    @property
    def final(self) -> Quality:
        """With all the training there was."""
        return self.after or self.before

    @property
    def kept(self) -> float:
        """Share of the parent's FLOPs."""
        return self.flops / self.parent_flops


def write(outcome: Result | Failure, root: Path) -> Path:
    """Write it, in place of what there was of the same run."""
    failed = isinstance(outcome, Failure)
    path = outcome.name.path(root, failed)
    write_json(path, outcome.model_dump(mode="json"))
    outcome.name.path(root, not failed).unlink(missing_ok=True)
    return path


def read_tier(tier: str, root: Path = RESULTS) -> list[Result]:
    """All results of a tier, by name."""
    return [_read(path, Result) for path in _files(root / tier, failed=False)]


def read_failures(tier: str, root: Path = RESULTS) -> list[Failure]:
    """All failures of a tier, by name."""
    return [_read(path, Failure) for path in _files(root / tier, failed=True)]


def _files(folder: Path, failed: bool) -> Iterator[Path]:
    for path in sorted(folder.glob("*/*.json")):
        if path.name.endswith(".failed.json") == failed:
            yield path


def _read(path: Path, kind: Any) -> Any:
    try:
        found = kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidCheckpoint(
            str(path), f"{first['msg'].lower()} at {'.'.join(map(str, first['loc']))}",
            f"a {kind.__name__} of version 1", "Delete it and run it again.",
        ) from error  # fmt: skip
    if found.name.path(Path(), failed=kind is Failure) != Path(*path.parts[-3:]):
        raise InvalidCheckpoint(str(path), f"the result of {found.name.stem}", "its own", "Give it its own name back.")
    return found


@cache
def git_sha() -> str:
    """Of the code that runs, with "+" where it was altered; "unknown" outside a clone."""
    try:
        sha = _git("rev-parse", "--short=12", "HEAD")
        altered = _git("status", "--porcelain", "--untracked-files=no", "--", "msa2conv", "benchmarks/*.py")
        return sha + ("+" if altered else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
