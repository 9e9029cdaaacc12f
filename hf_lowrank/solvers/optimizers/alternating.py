"""The default optimizer: alternating least squares by conjugate gradients, extrapolated from sweep to sweep."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_lowrank.solvers.optimizers.registry import Solution, Trace, damp_, register

# Conjugate gradient steps for each half of a sweep; more of them solve the half better, but a new half pays more.
STEPS = 2
# The extrapolation goes this share of the last sweep's step further; more after a success, less after a failure.
EXTRAPOLATION, GROWTH, SHRINKAGE = 0.7, 1.1, 0.7
# Gram matrices are regularised relative to their own scale.
DAMPING = 1e-6


@register("alternating")
def alternating(
    weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, max_iterations: int, tolerance: float
) -> Solution:
    """With one factor fixed every row of the other is a small weighted least-squares problem.

    All of them are improved at once by `STEPS` conjugate gradient steps, so that only matrix products remain. These may
    be of reduced precision, as the step lengths are exact for whatever direction results. The step of a whole sweep is
    then extrapolated as in Ang & Gillis (2019), in full precision, and the result kept only where its error is lower:
    the error never increases.

    What is carried along is the weighted residual E = importance ∘ (weight − up @ down), which gives both gradients.
    """
    up, down = diagonal_grams(up, down, importance)
    weighted = importance * (weight - up @ down)
    trace = Trace()
    trace.record(_error(weighted, importance), 1)
    beta = torch.full((), EXTRAPOLATION, device=weight.device)
    before = up, down
    for _ in range(max_iterations):
        with reduced_precision():
            up = _improve_up(up, down, importance, weighted)
            down = _improve_up(down.T, up.T, importance.T, weighted.T).T
        error = _error(weighted, importance)
        further = up + beta * (up - before[0]), down + beta * (down - before[1])
        before = up, down
        residual = weight - further[0] @ further[1]
        there = importance * residual
        further_error = (there * residual).sum()
        success = further_error < error
        up, down = (torch.where(success, new, old) for new, old in zip(further, before, strict=True))
        weighted = torch.where(success, there, weighted)
        beta = beta * torch.where(success, GROWTH, SHRINKAGE)
        trace.record(torch.where(success, further_error, error), 4 * STEPS + 1)
        if trace.converged(tolerance):
            break
    return Solution(up, down, trace)


def diagonal_grams(up: Tensor, down: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors whose Gram matrices under the mean importance are diagonal, and equal.

    upᵀ diag(r) up = down diag(c) downᵀ for the means r [out], c [in] of the importance. The rows' least-squares
    problems are then as well conditioned as one change of basis for all of them can make them, but for a scaling.
    """
    (left, left_inverse), (right, right_inverse) = (
        _square_root((factor.double() * mean) @ factor.double().T)
        for factor, mean in ((up.T, importance.mean(dim=1)), (down, importance.mean(dim=0)))
    )
    u, s, vh = torch.linalg.svd(left.T @ right)
    root = s.sqrt()
    up = up @ (left_inverse.T @ (u * root)).to(up.dtype)
    down = ((root[:, None] * vh) @ right_inverse).to(down.dtype) @ down
    return up, down


def _square_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of a Gram matrix [rank, rank], and its inverse."""
    lower = torch.linalg.cholesky(damp_(gram, DAMPING))
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return lower, torch.linalg.solve_triangular(lower, identity, upper=False)


def _improve_up(up: Tensor, down: Tensor, importance: Tensor, weighted: Tensor) -> Tensor:
    """`up` after `STEPS` conjugate gradient steps on every row's own problem; updates `weighted` in place.

    Each row i minimises Σⱼ importanceᵢⱼ (residualᵢⱼ − (step @ down)ᵢⱼ)², so α and β are one number per row. The
    preconditioner is the diagonal of down diag(mean importance) downᵀ, and `change` is laid out in memory as
    `weighted` is, which may be a transposed view.
    """
    scale = (down * down) @ importance.mean(dim=0)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    gradient = weighted @ down.T
    direction = gradient * inverse
    norm = _row_dots(gradient, direction)
    for remaining in reversed(range(STEPS)):
        change = torch.mm(direction, down, out=torch.empty_like(weighted))
        weighted_change = importance * change
        if remaining:
            turn = weighted_change @ down.T  # what the gradient loses per unit step
            curvature = _row_dots(direction, turn)
        else:
            curvature = _row_dots(change, weighted_change)
        alpha = torch.where(curvature > 0, norm / curvature, 0.0)
        up = torch.addcmul(up, alpha, direction)
        weighted.addcmul_(alpha, weighted_change, value=-1)
        if remaining:
            gradient = gradient - alpha * turn
            scaled = gradient * inverse
            previous, norm = norm, _row_dots(gradient, scaled)
            direction = scaled + torch.where(previous > 0, norm / previous, 0.0) * direction
    return up


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, keepdim=True)


def _error(weighted: Tensor, importance: Tensor) -> Tensor:
    return (weighted * weighted / importance).sum()


@contextmanager
def reduced_precision() -> Iterator[None]:
    """Let float32 matrix products run in bfloat16 or TF32 where the hardware is faster at these."""
    try:
        given = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller chose precisions by PyTorch's other interface: leave them alone
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(given)
