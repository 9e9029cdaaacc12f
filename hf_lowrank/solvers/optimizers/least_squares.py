"""Exact alternating least squares: every row's problem is solved, one small linear system each."""

import torch
from torch import Tensor

from hf_lowrank.solvers.optimizers.registry import Solution, Trace, damp_, register, weighted_error

# Numbers held at once for the systems of a block of rows: 128 MiB in float64.
BLOCK = 2**24
# The systems are regularised relative to their own scale.
DAMPING = 1e-12


@register("als")
def als(
    weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, max_iterations: int, tolerance: float
) -> Solution:
    """Each half attains the least error for the fixed other factor, so that the error never increases."""
    trace = Trace()
    trace.record(weighted_error(importance, weight - up @ down), 1)
    (out_features, rank), in_features = up.shape, down.shape[1]
    products = 1 + _products(rank, in_features) + _products(rank, out_features)
    for _ in range(max_iterations):
        up = best_up(weight, importance, down)
        down = best_up(weight.T, importance.T, up.T).T
        trace.record(weighted_error(importance, weight - up @ down), products)
        if trace.converged(tolerance):
            break
    return Solution(up, down, trace)


def best_up(weight: Tensor, importance: Tensor, down: Tensor) -> Tensor:
    """The `up` [out, rank] of least error for a `down` [rank, in]: row i solves down Dᵢ downᵀ upᵢ = down Dᵢ weightᵢ.

    Dᵢ = diag(importanceᵢ). The normal equations are formed and solved in float64.
    """
    basis = down.double()
    blocks = max(1, BLOCK // basis.numel())
    rows = []
    for part, its_weight in zip(importance.split(blocks), weight.split(blocks), strict=True):
        scaled = part.double()[:, None, :] * basis
        gram = damp_(scaled @ basis.T, DAMPING)
        target = scaled @ its_weight.double()[:, :, None]
        rows.append(torch.cholesky_solve(target, torch.linalg.cholesky(gram))[:, :, 0])
    return torch.cat(rows).to(down.dtype)


def _products(rank: int, length: int) -> float:
    """A half with rows of this length, in products: of a row, length·rank² for its system, rank³/6 to solve it."""
    return rank + 1 + rank**2 / (6 * length)
