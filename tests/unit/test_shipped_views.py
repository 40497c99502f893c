"""What calibrates a model when no images are given."""

from __future__ import annotations

import io
import itertools
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image

from msa2conv.data import shipped_views, transform, views_or_noise
from msa2conv.plan import Preprocessing

HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)


def test_they_are_always_the_same_and_all_different() -> None:
    views = shipped_views((3, 32, 32), HALF, 40)
    assert views.shape == (40, 3, 32, 32) and views.dtype == torch.float32
    assert torch.equal(shipped_views((3, 32, 32), HALF, 12), views[:12])
    assert len({view.numpy().tobytes() for view in views}) == 40
    assert views.min() >= -1 and views.max() <= 1 and 0.2 < views.std() < 0.8


def test_no_photo_is_there_twice() -> None:
    assert len({view.numpy().tobytes() for view in shipped_views((3, 16, 16), HALF, 1000)}) == 280


@pytest.mark.parametrize("size", [(3, 33, 48), (3, 48, 31)])
def test_of_any_shape(size: tuple[int, int, int]) -> None:
    assert shipped_views(size, HALF, 8).shape == (8, *size)


def test_where_photos_do_not_fit_two_networks_are_compared_on_noise() -> None:
    assert torch.equal(views_or_noise((3, 16, 16), HALF, 4), shipped_views((3, 16, 16), HALF, 4))
    assert torch.equal(views_or_noise((3, 16, 16), None, 4), shipped_views((3, 16, 16), Preprocessing(), 4))
    noise = views_or_noise((1, 16, 16), HALF, 4)
    assert noise.shape == (4, 1, 16, 16) and torch.equal(noise, views_or_noise((1, 16, 16), None, 4))
    assert 0.9 < noise.std() < 1.1


def test_they_are_normalised_as_the_model_says() -> None:
    other = HALF.model_copy(update={"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4)})
    plain, changed = (shipped_views((3, 32, 32), each, 8) for each in (HALF, other))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (other.mean, other.std))
    assert torch.allclose(changed * std + mean, plain / 2 + 0.5, atol=1e-6)


def test_a_quarter_is_clothing_as_it_is_and_the_file_is_what_its_readme_says() -> None:
    folder = resources.files("msa2conv.data")
    with folder.joinpath("photos.npz").open("rb") as file:
        packed = np.load(io.BytesIO(file.read()), allow_pickle=False)
    jpeg, offsets, scenes = packed["jpeg"].tobytes(), packed["offsets"], int(packed["scenes"])
    photos = [Image.open(io.BytesIO(jpeg[start:stop])) for start, stop in itertools.pairwise(offsets)]
    as_it_is = torch.stack([transform((3, 64, 64), HALF)(photo) for photo in photos[:3]])
    assert torch.equal(shipped_views((3, 64, 64), HALF, 9)[[0, 7, 8]], as_it_is)

    text = folder.joinpath("README.md").read_text()
    assert f"int64 [{len(offsets)}]" in text and f"int64, {scenes}: " in text
    assert f"{len(photos) - scenes} photos of 10 kinds of clothing" in text and f"and {scenes} photos of other" in text
    assert all(min(photo.size) <= 448 for photo in photos)
