"""What an allocation chooses from: the ranks a layer may have, what each costs, and what loss each adds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hf_lowrank.allocation.costs import Shape

Ranks = dict[str, int | None]  # None: the layer stays as it is, dense or at the rank it has


@dataclass(frozen=True)
class Choices:
    """One layer: its ranks, ascending, with what they cost and lose; the last is None, unless a cap forbids it.

    None stands for the layer as it is, dense or factorized at a larger rank, which loses nothing. `costs` never fall
    along the list and `losses`, where an allocation has any, never rise.
    `spectrum` is what each direction of the weight contributes to them.
    """

    shape: Shape
    ranks: tuple[int | None, ...]
    costs: tuple[float, ...]
    losses: tuple[float, ...] = ()
    spectrum: tuple[float, ...] = ()

    def at_most(self, rank: float) -> int:
        """The index of the largest choice of at most this rank, or the first; None only where nothing else is left."""
        fitting = [n for n, own in enumerate(self.ranks) if own is not None and own <= rank]
        return fitting[-1] if fitting else 0


def layer_choices(
    shape: Shape,
    cost: Callable[[Shape, int | None], float],
    candidates: Iterable[int] | None = None,
    least: float = 0,
    most: float = float("inf"),
    spectrum: Sequence[float] | None = None,
    kept: float | None = None,
) -> Choices:
    """The `candidates` from `least` to `most` that cost less than the layer as it is, and the layer as it is.

    Candidates are ascending ranks, all unless given; where none is within the bounds, the next below `most` is taken,
    and without any that cost less the layer stays as it is.
    `spectrum` [min(out, in)] is what discarding each direction adds to the loss, largest first: a rank loses the sum
    of those beyond it. `most` below the largest of them forbids keeping the layer too. `kept` is what it costs now,
    dense unless given.
    """
    kept = cost(shape, None) if kept is None else kept
    candidates = range(1, min(shape) + 1) if candidates is None else candidates
    saving = [r for r in candidates if cost(shape, r) < kept]
    allowed = [r for r in saving if least <= r <= most] or [r for r in saving if r <= most][-1:] or saving[:1]
    capped = bool(saving) and most < saving[-1]
    ranks: tuple[int | None, ...] = (*allowed,) if capped else (*allowed, None)
    costs = tuple(kept if rank is None else cost(shape, rank) for rank in ranks)
    if spectrum is None:
        return Choices(shape, ranks, costs)
    tails = [0.0]
    for value in reversed(spectrum):
        tails.append(tails[-1] + value)
    tails.reverse()  # tails[r] is what rank r loses
    return Choices(shape, ranks, costs, tuple(0.0 if rank is None else tails[rank] for rank in ranks), tuple(spectrum))


def total_cost(choices: dict[str, Choices], chosen: dict[str, int]) -> float:
    """What the chosen indices cost together."""
    return sum(choices[name].costs[index] for name, index in chosen.items())


def total_loss(choices: dict[str, Choices], chosen: dict[str, int]) -> float:
    """What the chosen indices lose together."""
    return sum(choices[name].losses[index] for name, index in chosen.items())


def cheapest(choices: dict[str, Choices]) -> float:
    """The least that every layer together can cost."""
    return sum(layer.costs[0] for layer in choices.values())


def dearest(choices: dict[str, Choices]) -> float:
    """The most that every layer together can cost."""
    return sum(layer.costs[-1] for layer in choices.values())
