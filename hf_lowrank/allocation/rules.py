"""Allocations: the choices of every layer + a budget → one choice for each. A dict and a decorator."""

import heapq
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hf_lowrank.allocation.choices import Choices, total_cost, total_loss
from hf_lowrank.jobs.settings import check_choice

Chosen = dict[str, int]  # name → index into its choices
Decide = Callable[[dict[str, Choices], float], Chosen]

# The knapsack keeps one combination of choices for each of so many parts of the budget.
KNAPSACK_PARTS = 4096


@dataclass(frozen=True)
class Allocation:
    """A rule that spreads a budget over layers, and where it takes the losses of choices from.

    "spectrum" is the loss that the method's own objective expects, "profile" the loss measured layer by layer.
    """

    name: str
    description: str
    losses: Literal["none", "spectrum", "profile"]
    decide: Decide


ALLOCATIONS: dict[str, Allocation] = {}


def get_allocation(name: str) -> Allocation:
    """The allocation called `name`.

    Raises:
        LowRankError: there is none; the message lists the names.
    """
    check_choice("allocation", name, ALLOCATIONS)
    return ALLOCATIONS[name]


def allocation(name: str, description: str, losses: Literal["none", "spectrum", "profile"]) -> Callable:
    """Register the decorated function as an allocation."""

    def register(decide: Decide) -> Decide:
        if name in ALLOCATIONS:
            raise ValueError(f"an allocation called {name!r} exists already")
        ALLOCATIONS[name] = Allocation(name, description, losses, decide)
        return decide

    return register


@allocation("uniform", "the same share of its ranks for every layer", "none")
def uniform(choices: dict[str, Choices], budget: float) -> Chosen:
    """The largest share of min(out, in) that fits, for every layer alike. The setting of FWSVD and TFWSVD."""

    def chosen(ratio: float) -> Chosen:
        return {name: _at_share(layer, ratio) for name, layer in choices.items()}

    return _largest(chosen, choices, budget)


@allocation("greedy", "directions in the order of expected loss saved per cost", "spectrum")
def greedy(choices: dict[str, Choices], budget: float) -> Chosen:
    """Steps of most loss saved per cost, over all layers, until the budget is used.

    A layer's steps are the edges of the convex hull of its (cost, loss) points, which is optimal where losses add up
    and steps are small; where an edge is too dear for what is left, its first single step is tried instead.
    """
    return _climbed(choices, dict.fromkeys(choices, 0), budget)


def _climbed(choices: dict[str, Choices], start: Chosen, budget: float) -> Chosen:
    """The greedy steps from `start`."""
    chosen = dict(start)
    left = budget - total_cost(choices, chosen)
    hulls = {name: _hull(layer) for name, layer in choices.items()}

    def step(name: str, target: int) -> tuple[float, str, int]:
        layer, now = choices[name], chosen[name]
        more, saved = layer.costs[target] - layer.costs[now], layer.losses[now] - layer.losses[target]
        return -saved / more if more > 0 else -math.inf, name, target

    def next_step(name: str) -> list[tuple[float, str, int]]:
        return [step(name, index) for index in hulls[name] if index > chosen[name]][:1]

    waiting = [first for name in choices for first in next_step(name)]
    heapq.heapify(waiting)
    while waiting:
        _, name, target = heapq.heappop(waiting)
        more = choices[name].costs[target] - choices[name].costs[chosen[name]]
        if more <= left:
            chosen[name], left = target, left - more
            for following in next_step(name):
                heapq.heappush(waiting, following)
        elif target > chosen[name] + 1:
            heapq.heappush(waiting, step(name, chosen[name] + 1))
    return chosen


@allocation("type-wise", "one rank for all layers of a type, greedy over types", "spectrum")
def type_wise(choices: dict[str, Choices], budget: float) -> Chosen:
    """As greedy, with all layers of one type and shape (names that differ in numbers alone) moving together."""
    kinds: dict[tuple[str, tuple[int | None, ...]], list[str]] = {}
    for name, layer in choices.items():
        kinds.setdefault((re.sub(r"\d+", "*", name), layer.ranks), []).append(name)
    joined = {
        str(number): Choices(
            choices[names[0]].shape,
            choices[names[0]].ranks,
            tuple(map(sum, zip(*(choices[name].costs for name in names), strict=True))),
            tuple(map(sum, zip(*(choices[name].losses for name in names), strict=True))),
        )
        for number, names in enumerate(kinds.values())
    }
    together = greedy(joined, budget)
    return {name: together[str(number)] for number, names in enumerate(kinds.values()) for name in names}


@allocation("effective-rank", "ranks in proportion to the entropy of the spectrum", "spectrum")
def by_entropy(choices: dict[str, Choices], budget: float) -> Chosen:
    """Ranks proportional to exp(entropy of the normalised spectrum), Roy & Vetterli (2007), as large as fits."""
    effective = {name: _entropy_rank(layer) for name, layer in choices.items()}

    def chosen(factor: float) -> Chosen:
        return {name: _at_share(layer, factor * effective[name] / min(layer.shape)) for name, layer in choices.items()}

    return _largest(chosen, choices, budget, most=max(min(layer.shape) for layer in choices.values()))


@allocation("knapsack", "the best combination of losses measured layer by layer at a few ranks", "profile")
def knapsack(choices: dict[str, Choices], budget: float) -> Chosen:
    """The choices of least total loss within the budget, by dynamic programming over the layers.

    Of the combinations for the layers so far, the one of least loss is kept for each of `KNAPSACK_PARTS` equal parts of
    the budget, with what it costs exactly. What is left in the end is spent by greedy steps. Of very many layers,
    greedy steps alone may be better than what was kept, and are taken then.
    """
    import numpy as np  # here, as it takes time to import

    part, rest = budget / KNAPSACK_PARTS, sum(layer.costs[0] for layer in choices.values())
    costs, losses, kept = np.zeros(1), np.zeros(1), []
    for layer in choices.values():
        rest -= layer.costs[0]  # the least that the layers to come will cost
        costs, losses = (np.add.outer(a, b).ravel() for a, b in ((costs, layer.costs), (losses, layer.losses)))
        order = np.lexsort((costs, losses, costs // part))
        order = order[(costs[order] + rest <= budget * (1 + 1e-12)) | (costs[order] == costs.min())]
        _, first = np.unique(costs[order] // part, return_index=True)
        kept.append(order[first])
        costs, losses = costs[kept[-1]], losses[kept[-1]]
    best, chosen = int(losses.argmin()), {}
    for (name, layer), origin in zip(reversed(choices.items()), reversed(kept), strict=True):
        best, chosen[name] = divmod(int(origin[best]), len(layer.ranks))
    best_kept = _climbed(choices, {name: chosen[name] for name in choices}, budget)
    return min(best_kept, greedy(choices, budget), key=lambda found: total_loss(choices, found))


def _at_share(layer: Choices, ratio: float) -> int:
    """The choice at rank ratio · min(out, in), rounded; dense where that is no longer among the ranks that save."""
    rank = round(ratio * min(layer.shape))
    if layer.ranks[-1] is None and rank > (layer.ranks[-2] if len(layer.ranks) > 1 else 0):  # type: ignore[operator]
        return len(layer.ranks) - 1
    return layer.at_most(rank)


def _largest(
    chosen: Callable[[float], Chosen], choices: dict[str, Choices], budget: float, most: float = 1.0
) -> Chosen:
    """The choices at the largest share up to `most` that the budget allows, by bisection."""
    low, high = 0.0, most
    if total_cost(choices, chosen(high)) <= budget:
        return chosen(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total_cost(choices, chosen(middle)) <= budget else (low, middle)
    return chosen(low)


def _hull(layer: Choices) -> list[int]:
    """The indices on the lower convex hull of the (cost, loss) points."""
    hull: list[int] = []
    for index in range(len(layer.ranks)):
        while len(hull) >= 2 and _above(layer, hull[-2], hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _above(layer: Choices, a: int, b: int, c: int) -> bool:
    """Whether the point b lies on or above the line from a to c."""
    (xa, ya), (xb, yb), (xc, yc) = ((layer.costs[n], layer.losses[n]) for n in (a, b, c))
    return (yb - ya) * (xc - xa) >= (yc - ya) * (xb - xa)


def _entropy_rank(layer: Choices) -> float:
    import numpy as np

    spectrum = np.asarray(layer.spectrum)
    spectrum = spectrum[spectrum > 0]
    if len(spectrum) == 0:
        return 1.0
    share = spectrum / spectrum.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
