"""Greedy ranks against an exhaustive search, within their budget."""

import itertools

import pytest
import torch

from hf_lowrank import CompressionConfig, LowRankError, compress
from hf_lowrank.allocation import greedy_ranks, parameters_at, uniform_ranks
from tests.helpers import tiny_bert

SHAPES = {"a": (8, 8), "b": (8, 16), "c": (16, 8)}


def spectra(seed: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(8, generator=generator).exp().pow(6).sort(descending=True).values.tolist() for name in SHAPES
    }


def loss(ranks: dict[str, int], weights: dict[str, list[float]]) -> float:
    """What is discarded; nothing, from a layer at break-even."""
    return sum(
        0 if parameters_at(SHAPES[name], rank) == SHAPES[name][0] * SHAPES[name][1] else sum(weights[name][rank:])
        for name, rank in ranks.items()
    )


def spent(ranks: dict[str, int]) -> int:
    return sum(parameters_at(SHAPES[name], rank) for name, rank in ranks.items())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [80, 150, 230])
def test_greedy_ranks_are_near_the_best_there_are(seed: int, budget: int) -> None:
    weights = spectra(seed)
    ranks = greedy_ranks(SHAPES, weights, budget)
    assert spent(ranks) <= budget
    best = min(
        loss(dict(zip(SHAPES, choice, strict=True)), weights)
        for choice in itertools.product(range(1, 9), repeat=3)
        if spent(dict(zip(SHAPES, choice, strict=True))) <= budget
    )
    largest = max(values[1] for values in weights.values())
    assert best <= loss(ranks, weights) + 1e-9 <= best + largest + 1e-6  # at most the last direction may differ


def test_greedy_follows_importance_and_uses_the_budget() -> None:
    weights = {"a": [1.0] * 8, "b": [100.0] * 8, "c": [1.0] * 8}
    ranks = greedy_ranks(SHAPES, weights, 16 + 24 + 24 + 3 * 24)
    assert ranks["b"] == 4
    assert ranks["a"] + ranks["c"] == 2


def test_a_large_enough_budget_makes_everything_dense() -> None:
    ranks = greedy_ranks(SHAPES, spectra(0), 10_000)
    assert spent(ranks) == sum(out * in_ for out, in_ in SHAPES.values())


def test_a_budget_below_rank_one_is_refused_with_the_least() -> None:
    with pytest.raises(LowRankError, match="a budget of 63 parameters is too small: rank 1 in every layer takes 64"):
        greedy_ranks(SHAPES, spectra(0), 63)


def test_a_greedy_model_is_as_large_as_a_uniform_one() -> None:
    sizes = {}
    for allocation in ("uniform", "greedy"):
        _, report = compress(tiny_bert(), CompressionConfig("svd", 0.25, allocation), progress=False)
        sizes[allocation] = report.parameters_after
        assert report.settings["allocation"] == allocation
    assert 0 <= sizes["uniform"] - sizes["greedy"] < 96
    with pytest.raises(LowRankError, match="unknown allocation 'best'; there are uniform, greedy"):
        CompressionConfig("svd", 0.25, "best")


def test_ratios_of_one_keep_all_ranks() -> None:
    assert uniform_ranks(SHAPES, 1.0) == {"a": 8, "b": 8, "c": 8}
