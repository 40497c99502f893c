"""Which parameters hang on one hidden unit? torch-pruning is asked once, at search time (its only importer)."""

from __future__ import annotations

import copy

import torch
from torch import nn


def hidden_units(ffn: nn.Module, first: str, shape: tuple[int, ...]) -> tuple[tuple[str, int], ...] | None:
    """(parameter path, dimension) of everything that goes when one output unit of the layer `first` goes.

    Args:
        ffn: the module; a copy is traced.
        first: path of the layer that produces the hidden units.
        shape: shape of the module's input.

    Returns:
        The group, or None when it reaches beyond Linear layers of this module (then pruning would not be safe).
    """
    import torch_pruning as tp

    ffn = copy.deepcopy(ffn).cpu().float().eval()
    for parameter in ffn.parameters():
        parameter.requires_grad_(True)  # torch-pruning walks the autograd graph
    names = {module: path for path, module in ffn.named_modules()}
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(ffn, example_inputs=torch.zeros(shape))
    root = ffn.get_submodule(first)
    units: list[tuple[str, int]] = []
    for item in graph.get_pruning_group(root, tp.prune_linear_out_channels, idxs=[0]):
        dependency = item[0]
        module, produces = dependency.target.module, graph.is_out_channel_pruning_fn(dependency.handler)
        if not isinstance(module, nn.Linear):
            if any(True for _ in module.parameters()):
                return None
            continue  # activations and reshapes hold nothing
        path = names[module]
        units.append((f"{path}.weight", 0 if produces else 1))
        if produces and module.bias is not None:
            units.append((f"{path}.bias", 0))
    return tuple(units)
