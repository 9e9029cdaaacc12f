"""A layer's weight and its decomposition, or an objective without closed form → factors, their error and directions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.compression.directions import Directions
from hf_lowrank.solvers import GAUGES, Objective
from hf_lowrank.solvers.decomposition import Decomposition
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import Channels, balanced_basis, flat_basis, in_basis
from hf_lowrank.solvers.scaled import Scaled


@dataclass(frozen=True)
class Iterated:
    """Factors of a method that iterates; `whole` is the error of leaving out the weight."""

    factors: Factors
    objective: Objective
    whole: Tensor

    @classmethod
    def at(cls, weight: Tensor, rank: int, objective: Objective, sides: Scaled, gauge: str) -> "Iterated":
        """Those of a rank, in a gauge under the error of rounding by its `sides`."""
        factors = GAUGES[gauge](objective.factorize(weight, rank), sides)
        return cls(factors, objective, objective.error(weight))

    def error(self, stored: Factors, delta: Tensor) -> Tensor:
        """That of the change `delta` [out, in] which the factors as they are stored make."""
        return self.objective.error(delta)

    def directions(self, loss_per_error: float, stored: Factors, mean: Tensor | None) -> None:
        """None: these have no order."""


@dataclass(frozen=True)
class Ordered:
    """The best factors of a rank by a decomposition, and the basis that made them of its first directions.

    Args:
        factors: in their gauge, in float64.
        objective: the decomposition.
        basis: R [r, r], which turned the `Decomposition.factors` into these.
        inverse: R⁻¹.
    """

    factors: Factors
    objective: Decomposition
    basis: Tensor
    inverse: Tensor

    @classmethod
    def at(cls, weight: Tensor, rank: int, found: Decomposition, mean: Tensor | None, gauge: str) -> "Ordered":
        """Those of a rank, in a gauge; `mean` is that of the inputs [in], where errors are about it, or None."""
        first = found.factors(weight, rank)
        basis = flat_basis(Channels.ordered(first, found, mean)) if gauge == "flat" else balanced_basis(first)
        factors, basis = in_basis(first, basis)
        return cls(factors, found, *basis)

    @property
    def whole(self) -> Tensor:
        """The error of leaving out the weight."""
        return self.objective.error(0)

    def error(self, stored: Factors, delta: Tensor) -> Tensor:
        """What is left out, and what rounding to the dtype that the factors are `stored` in adds.

        That is in the directions which are kept, so that both add up, and every number is rounded by itself.
        """
        energies = self.objective.energies(len(self.inverse))
        up, down = ((a - b).square() for a, b in ((stored.up, self.factors.up), (stored.down, self.factors.down)))
        of_up = self.objective.outputs @ up @ (self.inverse.square() @ energies)
        of_down = (energies @ self.basis.square()) @ down @ self.objective.inputs
        return self.objective.error(len(self.inverse)) + of_up + of_down

    def directions(self, loss_per_error: float, stored: Factors, mean: Tensor | None) -> Directions:
        """Those of the factors; `mean` is that of the inputs [in], where the bias makes up for what becomes of it."""
        basis = (self.inverse / self.inverse.abs().max()).half()
        along = torch.zeros_like(self.objective.worth[: len(basis)])
        if mean is not None:
            along = torch.linalg.solve(basis.double(), stored.down.double() @ mean.to(along))
        return Directions(basis, (self.objective.worth[: len(basis)] * loss_per_error).float(), along.float())
