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

# A triangle among rows or columns, and what earlier ones make of every entry; None where they are independent.
Coupling = tuple[Tensor, Tensor] | None

# What is outside of a tile of so many rows and columns counts by products of matrices; narrow ones have all rows.
TILE, NARROW = 128, 32

# Of how many weights the scales are looked for at once, so that they stay in the processor's cache.
CACHED = 2**16

# Ranges that a clipped grid tries, as shares of the largest weight's.
SHRINKS = torch.linspace(1.0, 0.6, 17)


@dataclass(frozen=True)
class Grid:
    """Whole numbers of `bits` times a scale, which is shared by a row, or by `group` entries next to each other in it.

    Args:
        bits: of a number.
        group: how many entries share a scale; None for those of a row (per output channel).
        clipped: which scale. Without, numbers are symmetric about 0 and the largest magnitude is the last of them.
            With, there is one more below 0, and of ranges a little narrower (`SHRINKS`) the one is taken at which
            rounding to nearest loses least: what is beyond is cut off.
        scales_in: the dtype in which scales are stored; None for that of the weight.

    Raises:
        LowRankError: bits that are not from 2 to 8, or a group below 1.
    """

    bits: int = 8
    group: int | None = None
    clipped: bool = False
    scales_in: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise LowRankError(f"a grid has 2 to 8 bits, not {self.bits}")
        if self.group is not None and self.group < 1:
            raise LowRankError(f"a group has at least 1 weight, not {self.group}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def bottom(self) -> int:
        """The smallest code."""
        return -self.top - int(self.clipped)

    def largest(self, weight: Tensor) -> Tensor:
        """The largest magnitudes [out, groups] of a weight [out, in]."""
        return self._grouped(weight.abs()).amax(dim=2)

    def scales(self, weight: Tensor) -> Tensor:
        """The distance between values [out, groups] for a weight [out, in]; 1 where there are only zeros."""
        if self.clipped:
            found = self._clipped(weight)
        else:
            largest = self.largest(weight)
            found = torch.where(largest > 0, largest / self.top, 1.0)
        return found if self.scales_in is None else found.to(self.scales_in).to(weight.dtype)

    def spread(self, scales: Tensor, columns: int) -> Tensor:
        """Scales [out, groups] → those of every entry [out, columns]."""
        return scales.repeat_interleave(min(self.group or columns, columns), dim=1)[:, :columns]

    def steps(self, weight: Tensor) -> Tensor:
        """The distance between values at every entry of a weight [out, in]."""
        return self.spread(self.scales(weight), weight.shape[1])

    def _grouped(self, weight: Tensor) -> Tensor:
        """The entries that share a scale [out, groups, size], zeros after the last ones of a row."""
        size = min(self.group or weight.shape[1], weight.shape[1])
        return torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))

    def _clipped(self, weight: Tensor) -> Tensor:
        """The scales of least squared error, of `SHRINKS` [out, groups]."""
        rows = self._grouped(weight.float())
        return torch.cat([self._best(part) for part in rows.split(max(1, CACHED // rows.shape[1:].numel()))]).to(
            weight.dtype
        )

    def _best(self, rows: Tensor) -> Tensor:
        """The same for entries [out, groups, size]."""
        widest = rows.abs().amax(2, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny) / (self.top + 0.5)
        best, least = widest, torch.full_like(widest, torch.inf)
        for shrink in SHRINKS.tolist():
            scale = widest * shrink
            error = (
                (rows - (rows / scale).round_().clamp_(self.bottom, self.top).mul_(scale))
                .square_()
                .sum(2, keepdim=True)
            )
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best.squeeze(2)


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
    codes = (weight / grid.spread(scales, weight.shape[1])).round().clamp(grid.bottom, grid.top)
    return Rounded(codes.to(torch.int8), scales, grid)


@dataclass(frozen=True)
class Tile:
    """A part of a matrix [rows, columns] on its way to a grid: views of its values, steps, and what became of it.

    Entries that are `kept` have their `codes`; `change` is Δ, and `made` Δ X.
    """

    values: Tensor
    steps: Tensor
    kept: Tensor
    codes: Tensor
    change: Tensor
    made: Tensor


@torch.no_grad()
def round_with_moments(
    weight: Tensor, outputs: Tensor, inputs: Tensor, grid: Grid, scales: Tensor | None = None
) -> Rounded:
    """Every entry of a weight [out, in] so that it makes up for those before it, under an error tr Δᵀ G Δ A.

    Scales are those of `round_to_nearest`. Where it is the largest entry that decides a scale, it keeps its code:
    rounding the result to nearest by the same rule gives the same codes. Entry (o, j) depends on those above it and to
    its left: antidiagonals are rounded at once, or whole columns where G is diagonal. Computed in float64, in tiles.

    Args:
        weight: [out, in].
        outputs: G [out, out], or its diagonal [out] if that is all there is. It must be positive.
        inputs: A [in, in], or its diagonal [in].
        grid: bits, and what shares a scale.
        scales: other ones [out, groups], as a quantizer's own rule gives them; no entry keeps its code then.
    """
    nearest = round_to_nearest(weight, grid, scales)
    values, steps = weight.double(), grid.spread(nearest.scales, weight.shape[1]).double()
    decides = weight.abs() >= grid.spread(grid.largest(weight), weight.shape[1])
    kept = decides if scales is None and not grid.clipped else torch.zeros_like(decides)
    across, along = (unit_upper(moment.to(values.device))[0] for moment in (outputs, inputs))
    codes, change, made = nearest.codes.double(), torch.zeros_like(values), torch.zeros_like(values)  # Δ, and Δ X
    for rows in _blocks(len(values), len(values) if across is None else TILE):
        above = None if across is None else across[: rows.start, rows].T @ made[: rows.start]
        for columns in _blocks(values.shape[1], NARROW if across is None else TILE):
            own = rows, columns
            tile = Tile(values[own], steps[own], kept[own], codes[own], change[own], made[own])
            left = None
            if along is not None:
                left = along[columns, columns], change[rows, : columns.start] @ along[: columns.start, columns]
            if across is None or above is None:
                _round_columns(tile, left, grid)
            else:
                _round_tile(tile, (across[rows, rows], above[:, columns]), left, grid)
    return Rounded(codes.to(torch.int8), nearest.scales, grid)


def _round_columns(tile: "Tile", along: Coupling, grid: Grid) -> None:
    """Round one part of a matrix whose rows do not depend on each other, one column after the other.

    Its `codes` and `change` are written. A coupling is a triangle among the columns of the tile, and what those before
    it make of every entry; None where they do not depend on each other.
    """
    values, steps, kept, codes = (part.T.contiguous() for part in (tile.values, tile.steps, tile.kept, tile.codes))
    change = torch.zeros_like(values)  # [columns, rows], as all here: what is read at once is in one place
    for column in range(len(values)):
        feedback = torch.zeros_like(values[column])
        if along is not None:
            triangle, earlier = along
            feedback = earlier[:, column] + triangle[:column, column] @ change[:column]
        free = ((values[column] - feedback) / steps[column]).round_().clamp_(grid.bottom, grid.top)
        codes[column] = torch.where(kept[column], codes[column], free)
        change[column] = codes[column] * steps[column] - values[column]
    tile.codes.copy_(codes.T)
    tile.change.copy_(change.T)


def _round_tile(tile: "Tile", across: tuple[Tensor, Tensor], along: Coupling, grid: Grid) -> None:
    """Round one part of a matrix whose rows depend on each other, one antidiagonal after the other.

    Its `codes`, `change` and `made` are written. A coupling is a triangle among the rows or columns of the tile, and
    what those before it make of every entry. With the columns turned round antidiagonals are diagonals, and so views.
    """
    rows, columns = tile.values.shape
    values, steps, kept, codes = (part.flip(1) for part in (tile.values, tile.steps, tile.kept, tile.codes))
    change, made = torch.zeros_like(values), torch.zeros_like(values.T)  # [rows, columns], [columns, rows]
    among_rows, from_rows = across[0].T.contiguous(), across[1].flip(1)
    among_columns, from_columns = None, torch.zeros_like(values)
    if along is not None:
        among_columns, from_columns = along[0].flip(0, 1).T.contiguous(), along[1].flip(1)
    for turn in range(rows + columns - 1):
        shift = columns - 1 - turn  # of the diagonal
        own = slice(max(0, -shift), min(rows, turn + 1))
        turned = slice(own.start + shift, own.stop + shift)
        before = from_columns.diagonal(shift)
        if among_columns is not None:
            before = before + torch.linalg.vecdot(change[own], among_columns[turned])
        feedback = before + from_rows.diagonal(shift) + torch.linalg.vecdot(made[turned], among_rows[own])
        value, step, code = values.diagonal(shift), steps.diagonal(shift), codes.diagonal(shift)
        free = ((value - feedback) / step).round_().clamp_(grid.bottom, grid.top)
        code.copy_(torch.where(kept.diagonal(shift), code, free))
        changed = code * step - value
        change.diagonal(shift).copy_(changed)
        made.diagonal(-shift).copy_(changed + before)
    tile.codes.copy_(codes.flip(1))
    tile.change.copy_(change.flip(1))
    tile.made.copy_(made.T.flip(1))


def unit_upper(moment: Tensor) -> tuple[Tensor | None, Tensor]:
    """X [n, n], strictly upper triangular, and d [n], with (I + X) diag(d) (I + X)ᵀ a positive matrix [n, n].

    None and the diagonal itself where that [n] is all there is. Where rounding made the matrix indefinite, as little as
    will do is added to its diagonal.
    """
    if moment.ndim == 1:
        return None, moment
    turned = moment.double().flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(turned)
    mean, share = turned.diagonal().mean(), 1e-10
    while failed:
        turned.diagonal().add_(share * torch.where(mean > 0, mean, 1.0))
        share *= 10
        lower, failed = torch.linalg.cholesky_ex(turned)
    upper = lower.flip(0, 1)  # moment = upper · upperᵀ
    return (upper / upper.diagonal()).triu(1), upper.diagonal().square()


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
