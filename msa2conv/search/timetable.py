"""What every option takes in time on a device: a second budget, as additive as FLOPs are."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import InvalidCheckpoint
from ..files import write_text
from ..options import Option
from ..plan import Shorten
from ..settings import Limit, Setting
from ..stream import transitions

MERGING = "merging through the network"
_LEAST = 0.1  # of the time by itself: what is measured as a difference may be off


class Timetable(BaseModel):
    """Times of modules, by geometry: what was measured once on a device serves every model with such modules.

    Args:
        device: where, and with what: name, threads, versions.
        entries: {hash of what was timed and of what it took turns with: ratio of the times}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    entries: dict[str, float] = {}

    @classmethod
    def of(cls, device: torch.device, path: str | os.PathLike[str] | None = None) -> Timetable:
        """An empty one, or what an earlier run wrote for the same device.

        Raises:
            InvalidCheckpoint: the file is no timetable.
        """
        here = cls(device=described(device))
        if path is None or not Path(path).is_file():
            return here
        try:
            known = cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise InvalidCheckpoint(
                str(path), "a file that is no timetable", "what an earlier run wrote there",
                "Delete it, or name another file.",
            ) from error  # fmt: skip
        return known if known.device == here.device else here

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def described(device: torch.device) -> str:
    """What times on a device depend on beside the modules."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        name = f"{device.type} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    return f"{name}, torch {torch.__version__}"


@dataclass(frozen=True)
class SiteTimes:
    """Seconds of every option and setting of one network.

    Args:
        base: of the whole original.
        hosts: {site path: of its module}.
        options: {(site path, option name, tokens it sees or None): of it, by itself}.
        kinds: {(site path, option name): what it does, whatever its sizes; "": nothing}.
        beside: {site path: of what stands beside it in its residual line}, of sites in a stream.
        lines: {tokens: of what stands beside sites of a stream, on so many, over that on all}.
        drops: {(patches before, patches after): of merging them, and restoring the grid}.
        slower: {kind: time in a network over that by itself}, of those that were seen in one; `MERGING` is a kind, too.
        table: all that was measured, for further runs.
    """

    base: float
    hosts: dict[str, float]
    options: dict[tuple[str, str, int | None], float]
    kinds: dict[tuple[str, str], str] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    lines: dict[int, float] = field(default_factory=dict)
    drops: dict[tuple[int, int], float] = field(default_factory=dict)
    slower: dict[str, float] = field(default_factory=dict)
    table: Timetable | None = field(default=None, repr=False)

    def of(self, option: Option) -> float:
        alone, kind = self.options[option.site, option.name, option.tokens], self._kind(option)
        return alone * (self.slower.get(kind, self._usually) if kind else 1.0)

    def _kind(self, option: Option) -> str:
        kind = self.kinds.get((option.site, option.name), "")
        return kind if option.tokens is None else f"{kind} on fewer tokens"

    @cached_property
    def _usually(self) -> float:
        """Of kinds that no network has shown; not quicker than by themselves, or the next plan would be all theirs."""
        known = [slower for kind, slower in self.slower.items() if kind != MERGING]
        return max(1.0, mean(known)) if known else 1.0

    def seen(self, choices: Mapping[str, Option], shares: Mapping[str, float]) -> SiteTimes:
        """Corrected by what modules take in a network, kind by kind: some are slower there than by themselves.

        Args:
            choices: of the network.
            shares: {site path: time of its module in there over that of the original's; "": of the whole network}.
        """
        alone, there = defaultdict[str, float](float), defaultdict[str, float](float)
        sites = {path: share for path, share in shares.items() if path}
        for path, share in sites.items():
            kind = self._kind(choices[path])
            if kind:
                alone[kind] += self.options[path, choices[path].name, choices[path].tokens]
                there[kind] += share * self.hosts[path]
        merged = next((option for path, option in choices.items() if path not in self.hosts), None)
        if merged is not None and "" in shares and sites.keys() >= choices.keys() & self.hosts.keys():
            outside = shares[""] * self.base - sum(share * self.hosts[path] for path, share in sites.items())
            before = self.base - sum(self.hosts[path] for path in sites)
            alone[MERGING] = self._merges(merged)
            there[MERGING] = outside - before + self._saved(_fewer(choices))
        known = {kind: max(_LEAST, there[kind] / alone[kind]) for kind in alone if alone[kind]}
        return replace(self, slower=self.slower | known)

    def of_setting(self, setting: Setting) -> float:
        return 0.0 if setting.option is None else self._merging(setting.option(), setting.tokens)

    def _merging(self, merged: Option, tokens: Mapping[str, int]) -> float:
        return self._merges(merged) * self.slower.get(MERGING, 1.0) - self._saved(tokens)

    def _merges(self, merged: Option) -> float:
        return sum(self.drops[pair] for pair in steps(merged))

    def _saved(self, tokens: Mapping[str, int]) -> float:
        """By what stands beside the sites, on fewer tokens."""
        return sum(self.beside[path] * (1 - self.lines[count]) for path, count in tokens.items())

    def limit(self, sites: Iterable[str], most: float) -> Limit:
        """As a budget of the solver.

        Args:
            sites: paths of the sites that have options.
            most: seconds allowed.
        """
        known: dict[int, float] = {}

        def of_setting(setting: Setting) -> float:
            if id(setting) not in known:
                known[id(setting)] = self.of_setting(setting)
            return known[id(setting)]

        return Limit(self.of, of_setting, self.base - sum(self.hosts[path] for path in sites), most)

    def total(self, choices: Mapping[str, Option]) -> float:
        """Seconds of the network in which these options were chosen."""
        found = self.base
        for path, option in choices.items():
            if path in self.hosts:
                found += self.of(option) - self.hosts[path]
            else:
                found += self._merging(option, _fewer(choices))
        return found


def _fewer(choices: Mapping[str, Option]) -> dict[str, int]:
    return {path: option.tokens for path, option in choices.items() if option.tokens is not None}


def steps(merged: Option) -> list[tuple[int, int]]:
    """(patches before, patches after) of every drop."""
    (edit,) = merged.edits
    assert isinstance(edit, Shorten)
    return transitions(edit.spec.count, edit.spec.drops)


__all__ = ["SiteTimes", "Timetable", "described", "steps"]
