"""Control: what msa2conv does at attentions, dealt out anew at random among attentions of the same shape."""

from __future__ import annotations

import random
from collections import defaultdict

from torch import nn

from msa2conv import Option

from .base import Context
from .restricted import Searched, named


class RandomLayers:
    name, keeps_grid = "random-layers", True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        searched = Searched.of(parent, budget, context)
        every, chosen = searched.calibration.options(), searched.chosen()
        alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
        for path, site in searched.attentions.items():
            alike[site.dim, site.layout.grid].append(path)
        draw, allowed = random.Random(context.seed), dict[str, list[Option]]()
        for paths in alike.values():
            names = [chosen[path].name for path in paths]
            draw.shuffle(names)
            allowed |= {path: named(every[path], name) for path, name in zip(paths, names, strict=True)}
        return searched.solved(searched.with_attentions({p: group for p, group in allowed.items() if group}))


METHODS = [RandomLayers()]
