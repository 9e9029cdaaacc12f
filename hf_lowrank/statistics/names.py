"""The kinds of statistics by name, and the pass over the data that each is measured in. No tensors: names, as data."""

from collections.abc import Sequence

from hf_lowrank.jobs.settings import check_choice

LABELS = ("data", "model")  # whose labels the losses of samples are by

# kind → the kinds that it is measured with, which an earlier pass over the data has measured
KIND_NEEDS: dict[str, tuple[str, ...]] = {
    "fisher": (),
    "fisher_rows": (),
    "activation_moment": (),
    "activation_magnitude": (),
    "activation_mean": (),
    "active_tokens": (),
    "gradient_moment": (),
    "kronecker_in": ("kronecker_out",),
    "kronecker_out": ("kronecker_in",),
    "fisher_sketch": (),
    "fisher_in_eigenbasis": ("gradient_moment", "activation_moment"),
}


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise where a kind of statistics is not known.

    Raises:
        LowRankError: it lists the kinds.
    """
    for kind in kinds:
        check_choice("statistic", kind, KIND_NEEDS)


# The factors that take turns, in their order, the first pass taking the identity for the other; for so many passes.
ALTERNATING = ("kronecker_out", "kronecker_in")
MOST_PASSES = 8


def passes(kinds: Sequence[str]) -> list[tuple[str, ...]]:
    """The kinds to measure in each pass over the data: in the second those that need others, in the first the rest.

    The factors that take turns (see `ALTERNATING`) are measured again in further passes, this many at most.
    """
    turns = ALTERNATING if any(kind in ALTERNATING for kind in kinds) else ()
    second = tuple(dict.fromkeys(kind for kind in kinds if KIND_NEEDS[kind] and kind not in ALTERNATING))
    needed = [need for kind in second for need in KIND_NEEDS[kind]]
    first = (*(kind for kind in kinds if not KIND_NEEDS[kind]), *needed, *turns[:1])
    plan = [tuple(dict.fromkeys(first)), second + turns[1:]]
    plan += [(turns[number % 2],) for number in range(2, MOST_PASSES) if turns]
    return [part for part in plan if part]
