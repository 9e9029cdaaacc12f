"""A weight or its factors, what counts on both sides, and grids → the values on them, those of least error known.

Entries make up for each other (see `hf_lowrank.solvers.rounding`), and factors for each other too. Should rounding each
entry to the nearest lose less, as where many are cut off, that is what comes out.

What the mean input makes of a change is the same in every token, and adds up. Where there is a bias, round under
centred inputs and let the bias make up for it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import with_ridge
from hf_lowrank.solvers.rounding import Grid, Rounded, round_to_nearest, round_with_moments
from hf_lowrank.solvers.scaled import Scaled


@dataclass(frozen=True)
class Grids:
    """What is rounded of factors `up` [out, r] and `down` [r, in], and to what.

    Args:
        up: its grid; None where it is not rounded.
        down: the other's.
        lookup: whether `down` is an embedding, which is stored, and rounded, as its transpose.
        columns: those of `down` that are rounded, where others are known, as in the interpolative form; None for all.
    """

    up: Grid | None
    down: Grid
    lookup: bool = False
    columns: Tensor | None = None

    def stored(self, down: Tensor) -> Tensor:
        """What is rounded of `down` [r, in]."""
        return down.T if self.lookup else down if self.columns is None else down[:, self.columns]

    def whole(self, down: Tensor, rounded: Rounded) -> Tensor:
        """`down` [r, in] with what was rounded."""
        values = rounded.weight().to(down)
        if self.columns is not None:
            return down.index_copy(1, self.columns, values)
        return values.T if self.lookup else values


@dataclass(frozen=True)
class RoundedFactors:
    """`up` on its grid, or None where it is not rounded, what was rounded of `down`, and the factors that they are."""

    up: Rounded | None
    down: Rounded
    factors: Factors


@torch.no_grad()
def round_factors(factors: Factors, sides: Scaled, grids: Grids) -> RoundedFactors:
    """Factors on grids, under an error ‖L Δ Rᵀ‖² of their product.

    `down` is rounded first, then what is left of its error is taken up by `up` (least squares), which is rounded with
    the moment of the inner channels as they are by then.
    """
    exact = Factors(factors.up.double(), factors.down.double())
    found = _to_nearest(exact, grids), _by_moments(exact, sides, grids)
    return min(found, key=lambda rounded: float(sides.error(rounded.factors.product() - exact.product())))


@torch.no_grad()
def round_weight(weight: Tensor, sides: Scaled, grid: Grid, lookup: bool = False) -> Rounded:
    """A weight [out, in] on a grid, under an error ‖L Δ Rᵀ‖²; an embedding is stored, and rounded, as its transpose."""
    exact = weight.double()
    inputs, outputs = _grams(sides, exact)
    by_moments = (
        round_with_moments(exact.T, inputs, outputs, grid)
        if lookup
        else (round_with_moments(exact, outputs, inputs, grid))
    )
    nearest = round_to_nearest(exact.T if lookup else exact, grid)

    def error(rounded: Rounded) -> float:
        change = rounded.weight() - (exact.T if lookup else exact)
        return float(sides.error(change.T if lookup else change))

    return min((nearest, by_moments), key=error)


def _by_moments(factors: Factors, sides: Scaled, grids: Grids) -> RoundedFactors:
    up, down = factors.up, factors.down
    inputs, outputs = _grams(sides, factors.product())
    by_channel = with_ridge(up.T @ sides.left.square(up))
    among = inputs
    if grids.columns is not None:
        among = inputs[grids.columns] if inputs.ndim == 1 else inputs[grids.columns][:, grids.columns]
    both = (among, by_channel) if grids.lookup else (by_channel, among)
    rounded_down = round_with_moments(grids.stored(down), *both, grids.down)
    there = grids.whole(down, rounded_down)
    weighted = sides.right.square(there.T)  # A D̂ᵀ
    moment = with_ridge(there @ weighted)
    refitted = torch.linalg.solve(moment, (up @ (down @ weighted)).T).T
    if grids.up is None:
        return RoundedFactors(None, rounded_down, Factors(refitted, there))
    rounded_up = round_with_moments(refitted, outputs, moment, grids.up)
    return RoundedFactors(rounded_up, rounded_down, Factors(rounded_up.weight(), there))


def _to_nearest(factors: Factors, grids: Grids) -> RoundedFactors:
    rounded_down = round_to_nearest(grids.stored(factors.down), grids.down)
    rounded_up = None if grids.up is None else round_to_nearest(factors.up, grids.up)
    up = factors.up if rounded_up is None else rounded_up.weight()
    return RoundedFactors(rounded_up, rounded_down, Factors(up, grids.whole(factors.down, rounded_down)))


def _grams(sides: Scaled, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A and G, or their diagonals, of a weight [out, in]."""
    return sides.right.gram(weight.shape[1]).to(weight.device), sides.left.gram(len(weight)).to(weight.device)
