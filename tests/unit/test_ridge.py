"""Closed forms against numpy's least squares, explicit leave-one-out, and the singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from msa2conv.levers.ridge import STRENGTHS, reduce_rank, ridge_by_leave_one_out, solve_ridge


def samples(count: int, inputs: int, outputs: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count + inputs)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.double) @ torch.diag(
        torch.linspace(0.2, 2, inputs, dtype=torch.double)
    )
    truth = torch.randn(inputs, outputs, generator=generator, dtype=torch.double)
    error = noise * torch.randn(count, outputs, generator=generator, dtype=torch.double)
    return x + 1.5, (x + 1.5) @ truth + 0.7 + error


@pytest.mark.parametrize("strength", [1e-12, 1e-3, 1.0])
def test_ridge_is_least_squares_on_augmented_rows(strength: float) -> None:
    x, y = samples(40, 6, 3)
    floor = strength * float((x.T @ x).diagonal().mean())
    rows = np.vstack([x.numpy(), np.sqrt(floor) * np.eye(6)])
    expected = np.linalg.lstsq(rows, np.vstack([y.numpy(), np.zeros((6, 3))]), rcond=None)[0]
    np.testing.assert_allclose(solve_ridge(x.T @ x, x.T @ y, strength).numpy(), expected, rtol=1e-8, atol=1e-10)


def test_a_rank_deficient_gram_is_still_solved() -> None:
    x, y = samples(40, 6, 3, noise=0.0)
    x = torch.cat((x, x[:, :3]), 1)
    solution = solve_ridge(x.T @ x, x.T @ y, 1e-20)
    assert float((x @ solution - (x @ torch.linalg.pinv(x) @ y)).abs().max()) < 1e-3
    assert torch.equal(solve_ridge(torch.zeros(4, 4).double(), torch.zeros(4, 2).double(), 1e-3), torch.zeros(4, 2))


def explicit_error(x: Tensor, y: Tensor, floor: float) -> float:
    """Fit without sample i, predict sample i, for every i; ridge `floor` on the weights, none on the bias."""
    total = 0.0
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        mean_x, mean_y = x[others].mean(0), y[others].mean(0)
        centred = x[others] - mean_x
        gram = centred.T @ centred + floor * torch.eye(x.shape[1], dtype=torch.double)
        weight = torch.linalg.solve(gram, centred.T @ (y[others] - mean_y))
        total += float(((x[i] - mean_x) @ weight + mean_y - y[i]).square().sum())
    return total


@pytest.mark.parametrize(("count", "inputs", "noise"), [(30, 4, 0.1), (12, 10, 2.0), (8, 20, 0.5), (20, 5, 6.0)])
def test_the_strength_minimises_the_explicit_leave_one_out_error(count: int, inputs: int, noise: float) -> None:
    x, y = samples(count, inputs, 3, noise)
    centred = x - x.mean(0)
    scale = float(centred.square().sum()) / inputs
    best = min(STRENGTHS, key=lambda strength: explicit_error(x, y, strength * scale))
    gram = centred.T @ centred + best * scale * torch.eye(inputs, dtype=torch.double)
    expected_IO = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)))
    found = ridge_by_leave_one_out(x, y)
    assert found is not None
    weight_OI, bias_O = found
    torch.testing.assert_close(weight_OI.T, expected_IO, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(bias_O, y.mean(0) - x.mean(0) @ expected_IO, rtol=1e-8, atol=1e-8)


def test_nothing_is_returned_where_the_mean_predicts_best() -> None:
    generator = torch.Generator().manual_seed(18)
    x, y = (torch.randn(12, width, generator=generator).double() for width in (8, 2))
    scale = float((x - x.mean(0)).square().sum()) / 8
    mean_alone = explicit_error(x, y, 1e12)
    assert all(explicit_error(x, y, strength * scale) > mean_alone for strength in STRENGTHS)
    assert ridge_by_leave_one_out(x, y) is None
    assert ridge_by_leave_one_out(torch.ones(9, 3), torch.randn(9, 2)) is None


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_reduced_rank_reaches_the_svd_optimum(rank: int) -> None:
    """Eckart-Young: no rank-R map loses less of the fitted outputs than the singular values behind the R-th."""
    x, y = samples(50, 7, 5)
    gram = x.T @ x
    solution = solve_ridge(gram, x.T @ y, 1e-6)
    first_RI, second_OR = reduce_rank(solution, gram, rank)
    assert first_RI.shape == (rank, 7) and second_OR.shape == (5, rank)
    lost = float((x @ (solution - (second_OR @ first_RI).T)).square().sum())
    smallest = float(torch.linalg.svdvals(x @ solution)[rank:].square().sum())
    assert lost == pytest.approx(smallest, rel=1e-6)


def test_a_gram_that_is_not_finite_is_an_error_not_an_endless_loop() -> None:
    gram_II = torch.full((3, 3), float("nan"), dtype=torch.double)
    with pytest.raises(torch.linalg.LinAlgError):
        solve_ridge(gram_II, torch.ones(3, 2, dtype=torch.double), 1e-3)
