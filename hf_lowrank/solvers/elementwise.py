"""Importance of every single element: no closed form, so the factors are found by alternating least squares."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.scaled import DiagonalScaling, Scaled

# Elements below this share of the mean importance count as this share, so that no element is free.
FLOOR = 1e-4
# Conjugate gradient steps for each half of a sweep; more of them solve the half better, but a new half pays more.
STEPS = 2
# The shared preconditioner is regularised relative to its own scale.
DAMPING = 1e-6


@dataclass(frozen=True)
class ElementWise:
    """error(Δ) = Σᵢⱼ importanceᵢⱼ Δᵢⱼ², for an `importance` [out, in] ≥ 0. TFWSVD, Hua et al. (2022), equation 4.

    With one factor fixed every row of the other is a small weighted least-squares problem. All of them are improved at
    once by a few steps of conjugate gradients in a basis where the fixed factor is orthonormal under the mean
    importance, so that only matrix products remain and no step can increase the error.

    `max_sweeps` and `tolerance` (relative decrease of the error over one sweep) end the iteration.
    """

    importance: Tensor
    max_sweeps: int = 50
    tolerance: float = 1e-4

    def error(self, delta: Tensor) -> Tensor:
        """Σ importance Δ² of a `delta` [out, in], a scalar."""
        return (self.importance.double() * delta.double().square()).sum()

    def spectrum(self, weight: Tensor) -> Tensor:
        """That of the two-sided diagonal scaling nearest to the importance [min(out, in)], largest first."""
        return self.two_sided().spectrum(weight)

    def two_sided(self) -> Scaled:
        """The scaling by the row and column sums of the importance: the importance itself where that has rank 1."""
        importance = self.importance.double()
        rows, columns, total = importance.sum(dim=1), importance.sum(dim=0), importance.sum()
        return Scaled(DiagonalScaling(rows), DiagonalScaling(columns / total if total > 0 else columns))

    def factorize(self, weight: Tensor, rank: int) -> Factors:
        """Factors of `weight` [out, in] at `rank`, never worse than those of `two_sided`, with a trace."""
        start = self.two_sided().factorize(weight, rank)
        mean = self.importance.float().mean()
        if mean == 0:
            return start
        relative = (self.importance.float() / mean).clamp_min(FLOOR)
        up, down = start.up.to(torch.float32), start.down.to(torch.float32)
        residual = weight.float() - up @ down
        trace = [_weighted(relative, residual)]
        for _ in range(self.max_sweeps):
            up, down = _orthonormal_down(up, down, relative)
            up = _improve_up(up, down, relative, residual)
            down, up = (factor.T for factor in _orthonormal_down(down.T, up.T, relative.T))
            down = _improve_up(down.T, up.T, relative.T, residual.T).T
            trace.append(_weighted(relative, residual))
            if trace[-2] - trace[-1] <= self.tolerance * trace[-2]:
                break
        return Factors(up, down, tuple((torch.stack(trace) * mean).tolist()))


@dataclass(frozen=True)
class Rotated:
    """The error of another objective after a change of basis: error(Q_Lᵀ Δ Q_R), with orthogonal Q_L and Q_R.

    A rotation keeps the rank, so that the factors are found there and rotated back.
    """

    objective: ElementWise
    left: Tensor
    right: Tensor

    def error(self, delta: Tensor) -> Tensor:
        """That of the rotated `delta` [out, in], a scalar."""
        return self.objective.error(self._rotate(delta))

    def spectrum(self, weight: Tensor) -> Tensor:
        """That of the rotated weight [min(out, in)], largest first."""
        return self.objective.spectrum(self._rotate(weight))

    def factorize(self, weight: Tensor, rank: int) -> Factors:
        """Factors of `weight` [out, in] at `rank`."""
        factors = self.objective.factorize(self._rotate(weight), rank)
        return Factors(self.left @ factors.up.float(), factors.down.float() @ self.right.T, factors.trace)

    def _rotate(self, matrix: Tensor) -> Tensor:
        return self.left.T @ matrix.float() @ self.right


def eigenbasis(left_moment: Tensor, right_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors of two moments [n, n], in columns, in float32: the same for the same moments."""
    left, right = (torch.linalg.eigh(moment.double())[1].float() for moment in (left_moment, right_moment))
    return left, right


def _weighted(importance: Tensor, residual: Tensor) -> Tensor:
    return (importance * residual * residual).sum()


def _orthonormal_down(up: Tensor, down: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with `down` orthonormal under the mean importance of the columns: down diag(c) downᵀ = I."""
    gram = (down * importance.mean(dim=0)) @ down.T
    gram = gram.double()
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    lower = torch.linalg.cholesky(gram)
    down = torch.linalg.solve_triangular(lower, down.double(), upper=False)
    return (up.double() @ lower).to(up.dtype), down.to(up.dtype)


def _improve_up(up: Tensor, down: Tensor, importance: Tensor, residual: Tensor) -> Tensor:
    """`up` after `STEPS` conjugate gradient steps on every row's own problem; updates `residual` in place.

    Each row i minimises Σⱼ importanceᵢⱼ (residualᵢⱼ − (step @ down)ᵢⱼ)², so α and β are one number per row.
    """
    gradient = (importance * residual) @ down.T
    direction = gradient
    norm = gradient.square().sum(dim=1, keepdim=True)
    for step in range(STEPS):
        change = direction @ down
        weighted_change = importance * change
        curvature = (weighted_change * change).sum(dim=1, keepdim=True)
        alpha = torch.where(curvature > 0, norm / curvature, 0.0)
        up = up + alpha * direction
        residual -= alpha * change
        if step + 1 < STEPS:
            gradient = gradient - alpha * (weighted_change @ down.T)
            previous, norm = norm, gradient.square().sum(dim=1, keepdim=True)
            direction = gradient + torch.where(previous > 0, norm / previous, 0.0) * direction
    return up
