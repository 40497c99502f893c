"""Module paths: which block a module belongs to."""

from __future__ import annotations


def block_of(path: str) -> str:
    """The path up to the last index above the module: 'blocks.3.attn' -> 'blocks.3', 'layers.0.blocks.1.mlp' -> '...1'.

    The innermost index of a module *inside* a block (timm's parallel blocks: 'blocks.3.attns.0.attn') is skipped, since
    siblings there run side by side and cannot be replayed one after the other.
    """
    parts = path.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    for i in reversed(indices):
        if i > 0 and parts[i - 1] in ("blocks", "layers"):
            return ".".join(parts[: i + 1])
    return ".".join(parts[: indices[-1] + 1]) if indices else path
