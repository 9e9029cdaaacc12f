"""Targets + budget → {module name: rank}."""

import heapq
from collections.abc import Callable

from torch import Tensor, nn

from hf_lowrank.errors import LowRankError
from hf_lowrank.targets import weight_shape

Shapes = dict[str, tuple[int, int]]  # (out, in) of every layer, by name
Spectra = Callable[[str], Tensor]  # name → what each direction costs when discarded, largest first

ALLOCATIONS = ("uniform", "greedy")


def allocate(targets: dict[str, nn.Module], rank_ratio: float, allocation: str, spectrum: Spectra) -> dict[str, int]:
    """The rank of every target by an allocation of `ALLOCATIONS`, with the parameters of the uniform one.

    Raises:
        LowRankError: an unknown allocation, or a ratio outside (0, 1].
    """
    check_allocation(allocation)
    shapes = {name: weight_shape(module) for name, module in targets.items()}
    uniform = uniform_ranks(shapes, rank_ratio)
    if allocation == "uniform":
        return uniform
    budget = sum(parameters_at(shapes[name], rank) for name, rank in uniform.items())
    return greedy_ranks(shapes, {name: spectrum(name).tolist() for name in targets}, budget)


def check_allocation(allocation: str) -> None:
    """Raise for an unknown name.

    Raises:
        LowRankError: the message lists the names.
    """
    if allocation not in ALLOCATIONS:
        raise LowRankError(f"unknown allocation {allocation!r}; there are {', '.join(ALLOCATIONS)}")


def uniform_ranks(shapes: Shapes, rank_ratio: float) -> dict[str, int]:
    """The same `rank_ratio` = rank / min(in, out) for every layer, rounded, at least 1. The papers' setting.

    Raises:
        LowRankError: the ratio is not in (0, 1].
    """
    if not 0 < rank_ratio <= 1:
        raise LowRankError(f"rank_ratio must be in (0, 1], the share of the ranks to keep; it is {rank_ratio}")
    return {name: max(1, round(rank_ratio * min(shape))) for name, shape in shapes.items()}


def greedy_ranks(shapes: Shapes, spectra: dict[str, list[float]], budget: int) -> dict[str, int]:
    """Ranks that keep the directions of highest loss saved per parameter, until `budget` parameters are spent.

    Discarding a direction of weight s costs s of (twice the expected) loss, keeping it out + in parameters.
    Taking directions in order of s / (out + in) over all layers is optimal where these costs add up. Every layer gets
    rank 1 at least; one that reaches break-even is dense from there on, at its true cost.

    Raises:
        LowRankError: the budget is less than rank 1 everywhere costs.
    """
    ranks = dict.fromkeys(shapes, 1)
    spent = sum(parameters_at(shape, 1) for shape in shapes.values())
    if spent > budget:
        raise LowRankError(f"a budget of {budget:,} parameters is too small: rank 1 in every layer takes {spent:,}")

    def worth(name: str) -> tuple[float, str]:
        return -spectra[name][ranks[name]] / sum(shapes[name]), name

    waiting = [worth(name) for name in shapes if len(spectra[name]) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        more = parameters_at(shapes[name], ranks[name] + 1) - parameters_at(shapes[name], ranks[name])
        if spent + more > budget:
            continue  # another layer's direction may still fit
        ranks[name], spent = ranks[name] + 1, spent + more
        if ranks[name] < len(spectra[name]) and saves_parameters(shapes[name], ranks[name]):
            heapq.heappush(waiting, worth(name))
    return ranks


def saves_parameters(shape: tuple[int, int], rank: int) -> bool:
    """Whether two factors of this rank have fewer parameters than the dense weight [out, in]."""
    return rank * sum(shape) < shape[0] * shape[1]


def parameters_at(shape: tuple[int, int], rank: int) -> int:
    """The parameters of a layer [out, in] at a rank: dense, where that is fewer."""
    return min(rank * sum(shape), shape[0] * shape[1])
