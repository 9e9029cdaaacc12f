"""Exact alternating least squares: every row's problem is solved, one small linear system each."""

import torch
from torch import Tensor

from hf_lowrank.solvers.optimizers.registry import Solution, Trace, register, weighted_error

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
    products = sum(_products(*shape, rank=up.shape[1]) for shape in (weight.shape, weight.T.shape)) + 1
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
        gram = scaled @ basis.T
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal.add_(DAMPING * diagonal.mean(dim=1, keepdim=True))
        target = scaled @ its_weight.double()[:, :, None]
        rows.append(torch.cholesky_solve(target, torch.linalg.cholesky(gram))[:, :, 0])
    return torch.cat(rows).to(down.dtype)


def _products(out_features: int, in_features: int, rank: int) -> float:
    """One half in products: Gram matrices out·in·rank², right sides out·in·rank, Cholesky out·rank³/6."""
    return rank + 1 + rank**2 / (6 * in_features)
