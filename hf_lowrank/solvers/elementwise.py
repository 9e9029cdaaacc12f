"""Importance of every single element: no closed form, so the factors are found by iteration."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.optimizers import get_optimizer
from hf_lowrank.solvers.scaled import DiagonalScaling, RotatedScaling, Scaled

# Elements below this share of the mean importance count as this share, so that no element is free.
FLOOR = 1e-4

# Iterations at most: those of first order are small steps, or many cheap ones.
MAX_SWEEPS = 50
MAX_ITERATIONS = dict.fromkeys(("sgd", "adam", "adam-sgd", "lbfgs", "em", "em-nesterov", "em-anderson"), 2000)


@dataclass(frozen=True)
class ElementWise:
    """error(Δ) = Σᵢⱼ importanceᵢⱼ Δᵢⱼ², for an `importance` [out, in] ≥ 0. TFWSVD, Hua et al. (2022).

    The factors start at the closed form of `two_sided` and are improved by `optimizer`, a name in `OPTIMIZERS`, for at
    most `max_sweeps` of its iterations, or until one decreases the error by less than a share `tolerance`.
    """

    importance: Tensor
    max_sweeps: int = MAX_SWEEPS
    tolerance: float = 1e-4
    optimizer: str = "alternating"

    def __post_init__(self) -> None:
        get_optimizer(self.optimizer)  # raises where there is none

    def error(self, delta: Tensor) -> Tensor:
        """Σ importance Δ² of a `delta` [out, in], a scalar."""
        return (self.importance.double() * delta.double().square()).sum()

    def mass(self, shape: tuple[int, int]) -> Tensor:
        """Σ importance, a scalar."""
        return self.importance.double().sum()

    def spectrum(self, weight: Tensor) -> Tensor:
        """That of the two-sided diagonal scaling nearest to the importance [min(out, in)], largest first."""
        return self.two_sided().spectrum(weight)

    def two_sided(self) -> Scaled:
        """The scaling by the row and column sums of the importance: the importance itself where that has rank 1."""
        importance = self.importance.double()
        rows, columns, total = importance.sum(dim=1), importance.sum(dim=0), importance.sum()
        return Scaled(DiagonalScaling(rows), DiagonalScaling(columns / total if total > 0 else columns))

    @torch.no_grad()
    def factorize(self, weight: Tensor, rank: int) -> Factors:
        """Factors of `weight` [out, in] at `rank`, never worse than those of `two_sided`, with a trace."""
        start = self.two_sided().factorize(weight, rank)
        mean = self.importance.float().mean()
        if mean == 0:
            return start
        relative = (self.importance.float() / mean).clamp_min(FLOOR)
        up, down, trace = get_optimizer(self.optimizer)(
            weight.float(), relative, start.up.float(), start.down.float(), self.max_sweeps, self.tolerance
        )
        return Factors(up, down, tuple(error * float(mean) for error in trace.values()))


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

    def mass(self, shape: tuple[int, int]) -> Tensor:
        """That of the rotated objective: a rotation leaves random changes as they are."""
        return self.objective.mass(shape)

    def spectrum(self, weight: Tensor) -> Tensor:
        """That of the rotated weight [min(out, in)], largest first."""
        return self.objective.spectrum(self._rotate(weight))

    def factorize(self, weight: Tensor, rank: int) -> Factors:
        """Factors of `weight` [out, in] at `rank`."""
        factors = self.objective.factorize(self._rotate(weight), rank)
        return Factors(self.left @ factors.up.float(), factors.down.float() @ self.right.T, factors.trace)

    def two_sided(self) -> Scaled:
        """That of the rotated objective, behind the rotations."""
        inner = self.objective.two_sided()
        return Scaled(RotatedScaling(inner.left, self.left), RotatedScaling(inner.right, self.right))

    def _rotate(self, matrix: Tensor) -> Tensor:
        return self.left.T @ matrix.float() @ self.right


def with_optimizer(objective: Any, optimizer: str) -> Any:
    """An `ElementWise` or `Rotated` objective, minimised by another optimizer with the iterations that it may need."""
    if isinstance(objective, Rotated):
        return replace(objective, objective=with_optimizer(objective.objective, optimizer))
    return replace(objective, optimizer=optimizer, max_sweeps=MAX_ITERATIONS.get(optimizer, MAX_SWEEPS))
