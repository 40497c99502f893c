"""Layout: what it accepts and what it refuses. Its bijection is law 7."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from msa2conv.errors import LayoutMismatch
from msa2conv.layouts import Layout


def test_vit_tokens_are_row_major_behind_the_prefix() -> None:
    layout = Layout(grid=(2, 3), prefix=1)
    tokens = torch.arange(7.0).reshape(1, 7, 1)
    prefix_BPC, map_BCHW = layout.to_map(tokens)
    assert prefix_BPC.flatten().tolist() == [0]
    assert map_BCHW[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_windows_are_cut_from_the_rolled_and_padded_map() -> None:
    layout = Layout(pattern="(b nh nw) (h w) c", grid=(2, 3), window=(2, 2), shift=(0, 1))
    map_BCHW = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).reshape(1, 1, 2, 3)
    tokens = layout.from_map(torch.zeros(0), map_BCHW)
    assert tokens[..., 0].tolist() == [[2, 3, 5, 6], [1, 0, 4, 0]]


def test_a_layout_is_a_value() -> None:
    """Using it (which caches) changes neither equality nor its hash nor its JSON."""
    used, fresh = Layout(grid=(2, 2)), Layout(grid=(2, 2))
    used.to_map(torch.zeros(1, 4, 3))
    assert used == fresh and hash(used) == hash(fresh)
    assert Layout.model_validate_json(used.model_dump_json()) == fresh
    with pytest.raises(ValidationError):
        used.prefix = 1


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "b (h w)"},
        {"pattern": "b (h w) c c"},
        {"pattern": "b (h w c)"},
        {"pattern": "b (h w c"},
        {"pattern": "b h w c x"},
        {"pattern": ""},
        {"pattern": "(b nh nw nh) (h w) c", "window": (2, 2)},
        {"window": (2, 2)},
        {"pattern": "b h w c", "prefix": 1},
        {"prefix": -1},
        {"shift": (4, 0)},
        {"shift": (0, -1)},
        {"grid": (0, 4)},
        {"grid": (4, 99999)},
        {"window": (0, 4)},
        {"unknown": 1},
    ],
    ids=str,
)
def test_malformed_layouts_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Layout.model_validate({"grid": (4, 4), **fields})


@pytest.mark.parametrize("shape", [(1, 16, 3), (1, 18, 3), (1, 17), (1, 4, 4, 3), (17, 3)], ids=str)
def test_tokens_of_another_geometry_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutMismatch, match="4 x 4 positions \\+ 1 prefix tokens"):
        Layout(grid=(4, 4), prefix=1).to_map(torch.zeros(shape))


def test_an_incomplete_set_of_windows_is_refused() -> None:
    layout = Layout(pattern="(b nh nw) (h w) c", grid=(4, 4), window=(2, 2))
    assert layout.to_map(torch.zeros(8, 4, 3))[1].shape == (2, 3, 4, 4)
    with pytest.raises(LayoutMismatch, match="in windows of 2 x 2"):
        layout.to_map(torch.zeros(6, 4, 3))
