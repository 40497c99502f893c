"""Closed-form linear regression: ridge with a leave-one-out choice of its strength, and reduced rank.

Grams are kept in float64; right-hand sides too. Shape suffixes: S samples, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTHS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)


def precise(x: Tensor) -> Tensor:
    """In float64, in which a Gram of any rows is positive semidefinite for all that follows."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def gram_of(rows_LD: Tensor) -> Tensor:
    """rows^T rows, of one matrix or of several."""
    return rows_LD.transpose(-2, -1) @ rows_LD


def floor_of(covariance_II: Tensor, strength: float) -> Tensor:
    """What a ridge of this strength, relative to the mean variance, adds to a covariance."""
    size = len(covariance_II)
    return strength * covariance_II.diagonal().mean().clamp_min(1e-12) * torch.eye(size, dtype=torch.double)


def solve_ridge(gram_II: Tensor, cross_IO: Tensor, strength: float) -> Tensor:
    """(gram + strength mean(diag) I)^-1 cross, by Cholesky; -> [I, O]."""
    size = gram_II.shape[0]
    floor = strength * gram_II.diagonal().mean().clamp_min(1e-12)
    regular = gram_II + floor * torch.eye(size, dtype=gram_II.dtype)
    factor, failed = torch.linalg.cholesky_ex(regular)
    lift = 1e-6 * floor.clamp_min(gram_II.diagonal().max())
    while failed:  # a rank-deficient Gram, whose floor is below rounding
        hopeless = not torch.isfinite(regular).all()  # no lift helps: the error is raised
        factor, failed = torch.linalg.cholesky_ex(regular + lift * torch.eye(size), check_errors=hopeless)
        lift *= 10
    return torch.cholesky_solve(cross_IO, factor)


def reduce_rank(solution_IO: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-R approximation of a regression in the metric of its inputs -> (first [R, I], second [O, R]).

    Izenman, "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 5 (1975): project the
    fitted outputs on their leading principal directions.
    """
    covariance_OO = solution_IO.T @ gram_II @ solution_IO
    directions_OR = torch.linalg.eigh(covariance_OO)[1][:, -rank:]
    return (solution_IO @ directions_OR).T, directions_OR


def ridge_by_leave_one_out(inputs_SI: Tensor, outputs_SO: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ridge regression whose strength minimises the exact leave-one-out error (Allen's PRESS, 1974).

    Args:
        inputs_SI, outputs_SO: the samples; centred here.

    Returns:
        (weight [O, I], bias [O]), or None when no strength predicts better than the mean alone.
    """
    x, y = inputs_SI.double(), outputs_SO.double()
    mean_I, mean_O = x.mean(0), y.mean(0)
    x, y = x - mean_I, y - mean_O
    count = len(x)
    left_SK, singular_K, right_KI = torch.linalg.svd(x, full_matrices=False)
    projected_KO = left_SK.T @ y
    scale = (singular_K**2).sum() / x.shape[1]
    best_error = float(((y * count / max(count - 1, 1)) ** 2).sum())
    best: Tensor | None = None
    for strength in STRENGTHS:
        if not scale > 0:
            break
        shrink_K = singular_K**2 / (singular_K**2 + strength * scale)
        leverage_S = (left_SK**2 * shrink_K).sum(1) + 1 / count
        residual_SO = (y - left_SK @ (shrink_K[:, None] * projected_KO)) / (1 - leverage_S).clamp_min(1e-9)[:, None]
        error = float((residual_SO**2).sum())
        if error < best_error:
            best_error, best = error, shrink_K
    if best is None:
        return None
    weight_OI = (right_KI.T @ ((best / singular_K.clamp_min(1e-12))[:, None] * projected_KO)).T
    return weight_OI, mean_O - weight_OI @ mean_I
