"""A budget as a person thinks of it → what the targeted layers may cost together, and in which unit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_lowrank.allocation.costs import Cost, Layer, Shape, Uses, flops, parameters
from hf_lowrank.errors import LowRankError

# Every budget, its unit and its meaning: the one definition of each.
BUDGETS = {
    "rank_ratio": "rank / min(in, out) of every targeted layer; allocations but the uniform one get as many parameters",
    "keep": "share to keep of the targeted layers' parameters, those that no sample reached apart",
    "keep_model": "share of the whole model's parameters to keep",
    "params": "parameters of the whole compressed model, such as 66.5M",
    "bytes": "bytes of the whole compressed model's weights, each layer's in 8 or 4 bits, such as 12MB",
    "flops": "floating-point operations of one token through the targeted layers, every use counted, such as 28M",
    "latency": "share of the targeted layers' time to keep, measured on this machine",
}

COUNTED = ("params", "bytes", "flops")  # in numbers, not in shares
PER_USE = ("flops", "latency")  # budgets of what layers do, not of what they are


class ImpossibleBudget(LowRankError):
    """No ranks meet the budget, or every layer could stay as it is."""


class AlreadySmaller(ImpossibleBudget):
    """A model that was compressed before is within the budget."""


@dataclass(frozen=True)
class Budget:
    """One of `BUDGETS` with its value.

    Raises:
        LowRankError: the value is not a positive number, or a share above 1.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        share = self.kind not in COUNTED
        if not (0 < self.value < math.inf and (self.value <= 1 or not share)):
            bounds = "in (0, 1]" if share else "a positive number"
            raise LowRankError(f"{self.kind} must be {bounds}, {BUDGETS[self.kind]}; it is {self.value}")


@dataclass(frozen=True)
class Limit:
    """The most that all targeted layers may cost together, by `cost`. `shown` turns a total back into the budget."""

    total: float
    cost: Cost
    shown: Callable[[float], float]

    def cost_of(self, uses: Uses) -> Callable[[Shape, int | None], float]:
        """What a layer with these uses costs, by its shape and rank."""
        return lambda shape, rank: self.cost(shape, rank, uses)


def limit_of(
    budget: Budget, layers: Sequence[Layer], model_parameters: int, others: float, latency: Cost | None = None
) -> Limit:
    """What a budget other than a rank ratio allows these layers.

    `model_parameters` are those of the dense model, `others` those that the model has besides these layers. `latency`
    is the time that a layer takes, for a budget of it.

    Raises:
        LowRankError: a budget of latency without it.
    """
    dense = sum(parameters(layer.shape, None) for layer in layers)
    if budget.kind == "flops":
        return Limit(budget.value, flops, lambda total: total)
    if budget.kind == "latency":
        if latency is None:
            raise LowRankError("a latency budget needs the time that layers take: pass `latency` (measured_latency)")
        whole = sum(latency(layer.shape, None, layer.uses) for layer in layers)
        return Limit(budget.value * whole, latency, lambda total: total / whole)
    if budget.kind == "keep":
        return Limit(budget.value * dense, parameters, lambda total: total / dense)
    scale = model_parameters if budget.kind == "keep_model" else 1
    return Limit(budget.value * scale - others, parameters, lambda total: (total + others) / scale)


def check_range(budget: Budget, limit: Limit, least: float, most: float) -> None:
    """Raise where no ranks meet the limit, or every layer could stay dense.

    Raises:
        ImpossibleBudget: the message gives the possible range in the budget's own unit.
    """
    # A share of 1 or the dense size itself is allowed: it asks for nothing.
    if limit.total < least * (1 - 1e-9) or limit.total > most * (1 + 1e-9):
        low, high = (readable(budget, limit.shown(total)) for total in (least, most))
        raise ImpossibleBudget(
            f"{budget.kind} {readable(budget, budget.value)} cannot be met: it must be between {low} (the smallest "
            f"ranks) and {high} (all layers dense)"
        )


def parse_count(text: Any) -> float:
    """A number with an optional K, M or B.

    >>> parse_count("66.5M")
    66500000.0

    Raises:
        LowRankError: it is something else.
    """
    if isinstance(text, (int, float)):
        return text
    factor = {"K": 1e3, "M": 1e6, "B": 1e9}.get(str(text).strip()[-1:].upper(), 1)
    try:
        return round(float(str(text).strip().rstrip("KMBkmb")) * factor, 3)
    except ValueError:
        raise LowRankError(f"{text!r} is not a count such as 66500000, 66.5M or 7B") from None


def parse_bytes(text: Any) -> float:
    """A number with an optional KB, MB or GB, which are powers of 1000.

    >>> parse_bytes("12MB")
    12000000.0

    Raises:
        LowRankError: it is something else.
    """
    if isinstance(text, (int, float)):
        return text
    number = str(text).strip().upper().removesuffix("B")
    try:
        return float(number.rstrip("KMG")) * {"K": 1e3, "M": 1e6, "G": 1e9}.get(number[-1:], 1)
    except ValueError:
        raise LowRankError(f"{text!r} is no number of bytes such as 12000000, 12MB or 1.5GB") from None


def readable(budget: Budget, value: float) -> str:
    """A value of a budget as messages show it."""
    return f"{value:,.0f}" if budget.kind in COUNTED else f"{value:.4f}"
