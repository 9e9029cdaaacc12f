"""How a budget is spread over layers: by which allocation, and within which bounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_lowrank.allocation.costs import Shape
from hf_lowrank.allocation.rules import get_allocation
from hf_lowrank.errors import LowRankError

# Ranks that are multiples of 8 are the fastest on CPUs (benchmarks/speed.md); small layers gain nothing by them.
ALIGN, ALIGNED_FROM = 8, 64


@dataclass(frozen=True)
class Spread:
    """How a budget is spread: an allocation of `ALLOCATIONS`, and what bounds every layer's rank.

    Ranks are multiples of `align`. None, the default: of 8, or below 8, in layers whose smaller side is at least 64,
    and any rank in smaller ones and by the allocation "uniform", the papers' setting. `floor` and `cap` are relative
    to the uniform rank at the same budget: no layer gets less than `floor` (0 to 1) times it, none more than `cap` (at
    least 1).

    Raises:
        LowRankError: the allocation is unknown, or a bound is out of range.
    """

    allocation: str = "uniform"
    align: int | None = None
    floor: float = 0.0
    cap: float = math.inf

    def __post_init__(self) -> None:
        get_allocation(self.allocation)
        check_bounds(self.align, self.floor, self.cap)

    def ranks(self, shape: Shape) -> Sequence[int]:
        """The ranks that a layer [out, in] may have, ascending."""
        largest = min(shape)
        if self.align is not None:
            return range(self.align, largest + 1, self.align)
        if self.allocation == "uniform" or largest < ALIGNED_FROM:
            return range(1, largest + 1)
        return [*range(1, ALIGN), *range(ALIGN, largest + 1, ALIGN)]


def check_bounds(align: int | None, floor: float, cap: float | None) -> None:
    """Raise where a bound is out of range; `cap` None is no bound.

    Raises:
        LowRankError: the message says the ranges and the values.
    """
    if (align is not None and align < 1) or not 0 <= floor <= 1 or (cap is not None and cap < 1):
        raise LowRankError(
            f"align must be at least 1, floor in [0, 1] and cap at least 1; they are {align}, {floor} and {cap}"
        )
