"""Targets + budget → {module name: rank}."""

from torch import nn

from hf_lowrank.errors import LowRankError
from hf_lowrank.targets import weight_shape


def uniform_ranks(targets: dict[str, nn.Module], rank_ratio: float) -> dict[str, int]:
    """The same `rank_ratio` = rank / min(in, out) for every layer, rounded, at least 1. The papers' setting.

    Raises:
        LowRankError: the ratio is not in (0, 1].
    """
    if not 0 < rank_ratio <= 1:
        raise LowRankError(f"rank_ratio must be in (0, 1], the share of the ranks to keep; it is {rank_ratio}")
    return {name: max(1, round(rank_ratio * min(weight_shape(module)))) for name, module in targets.items()}


def saves_parameters(out_features: int, in_features: int, rank: int) -> bool:
    """Whether two factors of this rank have fewer parameters than the dense weight."""
    return rank * (out_features + in_features) < out_features * in_features
