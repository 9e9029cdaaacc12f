"""A weight and what counts on both sides → the weight on a grid of few bits, each entry making up for those before it.

The error of a change Δ is tr Δᵀ G Δ A, that of `Scaled`. With A = X diag(a) Xᵀ and G = Y diag(g) Yᵀ, X and Y unit upper
triangular, it is Σ gₒ aⱼ (Yᵀ Δ X)ₒⱼ², and every entry of Yᵀ Δ X is one entry of Δ plus what earlier ones make of it.
Rounding one entry after the other, to the nearest value that also makes up for the earlier ones, leaves
Σ gₒ aⱼ step² / 12 in expectation, where rounding each by itself leaves Σ Gₒₒ Aⱼⱼ step² / 12. With a diagonal G this is
GPTQ (Frantar et al., 2022), in the form LDLQ (Chee et al., 2023): G then only scales rows, whose roundings do not
depend on it. Where G is not diagonal, as Uᵀ G U of the rows of `down` never is, rows make up for each other too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import with_ridge
from hf_lowrank.solvers.scaled import Scaled


@dataclass(frozen=True)
class Grid:
    """Whole numbers of `bits`, symmetric about 0, times a scale: the largest magnitude that shares it is the last one.

    A scale is shared by all entries of a row (per output channel), or by `group` entries next to each other in it.

    Raises:
        LowRankError: bits that are not from 2 to 8, or a group below 1.
    """

    bits: int = 8
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise LowRankError(f"a grid has 2 to 8 bits, not {self.bits}")
        if self.group is not None and self.group < 1:
            raise LowRankError(f"a group has at least 1 weight, not {self.group}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def largest(self, weight: Tensor) -> Tensor:
        """The largest magnitudes [out, groups] of a weight [out, in]."""
        size = min(self.group or weight.shape[1], weight.shape[1])
        padded = torch.nn.functional.pad(weight.abs(), (0, -weight.shape[1] % size))
        return padded.unflatten(1, (-1, size)).amax(dim=2)

    def scales(self, weight: Tensor) -> Tensor:
        """The distance between values [out, groups] for a weight [out, in]; 1 where there are only zeros."""
        largest = self.largest(weight)
        return torch.where(largest > 0, largest / self.top, 1.0)

    def spread(self, scales: Tensor, columns: int) -> Tensor:
        """Scales [out, groups] → those of every entry [out, columns]."""
        return scales.repeat_interleave(min(self.group or columns, columns), dim=1)[:, :columns]

    def steps(self, weight: Tensor) -> Tensor:
        """The distance between values at every entry of a weight [out, in]."""
        return self.spread(self.scales(weight), weight.shape[1])


@dataclass(frozen=True)
class Rounded:
    """`codes` [out, in], whole numbers in int8, and their `scales` [out, groups], in the dtype of the weight."""

    codes: Tensor
    scales: Tensor
    grid: Grid

    def weight(self) -> Tensor:
        """The weight [out, in] that they stand for."""
        return self.codes * self.grid.spread(self.scales, self.codes.shape[1])


def round_to_nearest(weight: Tensor, grid: Grid, scales: Tensor | None = None) -> Rounded:
    """Every entry of a weight [out, in] by itself, with the scales of the grid or others [out, groups]."""
    scales = grid.scales(weight) if scales is None else scales
    codes = (weight / grid.spread(scales, weight.shape[1])).round().clamp(-grid.top, grid.top)
    return Rounded(codes.to(torch.int8), scales, grid)


@torch.no_grad()
def round_with_moments(
    weight: Tensor, outputs: Tensor, inputs: Tensor, grid: Grid, scales: Tensor | None = None
) -> Rounded:
    """Every entry of a weight [out, in] so that it makes up for those before it, under an error tr Δᵀ G Δ A.

    Scales are those of `round_to_nearest`, and the largest entry, which decides a scale, keeps its code: rounding the
    result to nearest by the same rule gives the same codes. Entry (o, j) depends on those above it and to its left:
    antidiagonals are rounded at once, or whole columns where G is diagonal. Computed in float64.

    Args:
        weight: [out, in].
        outputs: G [out, out], or its diagonal [out] if that is all there is. It must be positive.
        inputs: A [in, in], or its diagonal [in].
        grid: bits, and what shares a scale.
        scales: other ones [out, groups], as a quantizer's own rule gives them; no entry keeps its code then.
    """
    nearest = round_to_nearest(weight, grid, scales)
    values, steps = weight.double(), grid.spread(nearest.scales, weight.shape[1]).double()
    codes = nearest.codes.double()
    decides = weight.abs() >= grid.spread(grid.largest(weight), weight.shape[1])
    kept = decides if scales is None else torch.zeros_like(decides)
    across, along = (unit_upper(moment.to(values.device))[0] for moment in (outputs, inputs))
    change, made = torch.zeros_like(values), torch.zeros_like(values)  # Δ, and Δ X
    for rows, columns in _wavefronts(weight.shape, coupled=across is not None):
        feedback = torch.zeros_like(values[rows, columns])
        if along is not None:
            feedback += (change[rows] * along[:, columns].T).sum(dim=1)
        before = feedback.clone()
        if across is not None:
            feedback += (made[:, columns] * across[:, rows]).sum(dim=0)
        value, step, fixed = values[rows, columns], steps[rows, columns], kept[rows, columns]
        free = ((value - feedback) / step).round().clamp(-grid.top, grid.top)
        chosen = torch.where(fixed, codes[rows, columns], free)
        codes[rows, columns], change[rows, columns] = chosen, chosen * step - value
        made[rows, columns] = change[rows, columns] + before
    return Rounded(codes.to(torch.int8), nearest.scales, grid)


@torch.no_grad()
def round_factors(factors: Factors, sides: Scaled, grid: Grid, lookup: bool = False) -> tuple[Rounded, Rounded]:
    """`up` [out, r] and `down` [r, in] on a grid, under an error ‖L Δ Rᵀ‖² of their product.

    `down` is rounded first, then what is left of its error is taken up by `up` (least squares), which is rounded with
    the moment of the inner channels as they are by then. With `lookup`, `down` is an embedding, stored [in, r]: what is
    rounded and returned is its transpose.

    What the mean input makes of a change is the same in every token, and adds up. Where there is a bias, round under
    centred inputs and let the bias make up for it.
    """
    up, down = factors.up.double(), factors.down.double()
    inputs, outputs = sides.right.gram(down.shape[1]), sides.left.gram(len(up))
    by_channel = with_ridge(up.T @ sides.left.square(up))
    if lookup:
        rounded_down = round_with_moments(down.T, inputs, by_channel, grid)
        there = rounded_down.weight().T
    else:
        rounded_down = round_with_moments(down, by_channel, inputs, grid)
        there = rounded_down.weight()
    weighted = sides.right.square(there.T)  # A D̂ᵀ
    moment = with_ridge(there @ weighted)
    refitted = torch.linalg.solve(moment, (up @ (down @ weighted)).T).T
    return round_with_moments(refitted, outputs, moment, grid), rounded_down


def unit_upper(moment: Tensor) -> tuple[Tensor | None, Tensor]:
    """X [n, n], strictly upper triangular, and d [n], with (I + X) diag(d) (I + X)ᵀ a positive matrix [n, n].

    None and the diagonal itself where that [n] is all there is.
    """
    if moment.ndim == 1:
        return None, moment
    upper = torch.linalg.cholesky(moment.double().flip(0, 1)).flip(0, 1)  # moment = upper · upperᵀ
    return (upper / upper.diagonal()).triu(1), upper.diagonal().square()


def _wavefronts(shape: torch.Size, coupled: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, columns) of the entries of a matrix that are rounded at once: columns, or antidiagonals where coupled."""
    start = torch.arange(shape[0]) * int(coupled)
    for turn in range(shape[1] + int(start[-1])):
        rows = ((turn >= start) & (turn < start + shape[1])).nonzero()[:, 0]
        yield rows, turn - start[rows]
