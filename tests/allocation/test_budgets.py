"""Budgets over random layers: never exceeded, whatever the allocation and the bounds, and hardly anything is left."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowrank.allocation import (
    ALLOCATIONS,
    Budget,
    ImpossibleBudget,
    Layer,
    Spread,
    allocate,
    minimal_parameters,
    parameters,
    parameters_at,
    uniform_ranks,
)
from hf_lowrank.allocation.choices import Choices, dearest, layer_choices, total_cost, total_loss
from hf_lowrank.allocation.rules import greedy, knapsack

SIDES = st.sampled_from([1, 2, 3, 8, 16, 17, 33, 64, 65, 96, 128])
SHAPES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5)
SHARES = st.floats(0.01, 1.0)


@settings(max_examples=300, deadline=None)
@given(
    shapes=SHAPES,
    kind=st.sampled_from(["rank_ratio", "keep", "keep_model", "params", "flops"]),
    share=SHARES,
    allocation=st.sampled_from(sorted(ALLOCATIONS)),
    align=st.sampled_from([None, 1, 2, 4, 8, 16]),
    bounds=st.sampled_from([(0.0, None), (0.5, None), (0.9, 1.1), (1.0, 1.0), (0.0, 1.5)]),
    form=st.sampled_from(["factors", "interpolative"]),
    seed=st.integers(0, 99),
)
def test_a_budget_is_kept_or_refused(
    shapes: list[tuple[int, int]],
    kind: str,
    share: float,
    allocation: str,
    align: int | None,
    bounds: tuple[float, float | None],
    form: str,
    seed: int,
) -> None:
    layers = {str(n): shape for n, shape in enumerate(shapes)}
    described = {name: Layer(shape) for name, shape in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    spectra = {name: torch.rand(min(shape), generator=generator).sort(descending=True).values
               for name, shape in layers.items()}  # fmt: skip
    profile = {name: {rank: float(s[rank:].sum()) for rank in range(1, len(s) + 1)} for name, s in spectra.items()}
    dense, others = sum(out * inp for out, inp in shapes), 50
    whole = dense + others
    value = {"params": share * whole, "flops": share * 2 * dense}.get(kind, share)
    allowed = {"keep": share * dense, "keep_model": share * whole - others, "params": share * whole - others}
    allowed["flops"] = share * dense
    allowed["rank_ratio"] = sum(parameters_at(layers[n], rank) for n, rank in uniform_ranks(layers, share).items())
    floor, cap = bounds
    spread = Spread(allocation, align, floor, **({} if cap is None else {"cap": cap}))
    try:
        ranks = allocate(described, whole, Budget(kind, value), spread, spectra.__getitem__, profile, form)
    except ImpossibleBudget:
        return
    cost = parameters if form == "factors" else minimal_parameters
    assert sum(cost(layers[name], rank) for name, rank in ranks.items()) <= allowed[kind] * (1 + 1e-6)


def test_a_ratio_below_the_first_multiple_is_refused() -> None:
    """Multiples of 16 of a layer of 64 begin at a quarter."""
    layers = {"a": Layer((64, 64))}
    for allocation in ("uniform", "greedy"):
        spread = Spread(allocation, 16)
        with pytest.raises(ImpossibleBudget, match=r"rank_ratio 0\.1 cannot be met by ranks that are multiples of 16"):
            allocate(layers, 4096, Budget("rank_ratio", 0.1), spread, lambda name: torch.ones(64))
        assert allocate(layers, 4096, Budget("rank_ratio", 0.25), spread, lambda name: torch.ones(64)) == {"a": 16}


def many_layers(count: int) -> dict[str, Choices]:
    """Layers of random shapes, each measured at five ranks."""
    draw, choices = random.Random(count), {}
    for n in range(count):
        shape = draw.randint(64, 512), draw.randint(64, 512)
        ranks = sorted({max(1, round(share * min(shape))) for share in (0.05, 0.1, 0.15, 0.25, 0.4)})
        spectrum = sorted((2.718 ** (8 * draw.random()) for _ in range(min(shape))), reverse=True)
        choices[str(n)] = layer_choices(shape, parameters, ranks, spectrum=spectrum)
    return choices


@pytest.mark.parametrize("count", [3, 40, 400])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_knapsack_leaves_no_room_for_another_step(count: int, share: float) -> None:
    choices = many_layers(count)
    budget = share * dearest(choices)
    chosen = knapsack(choices, budget)
    left = budget - total_cost(choices, chosen)
    steps = [each.costs[n + 1] - each.costs[n] for name, each in choices.items()
             if (n := chosen[name]) + 1 < len(each.costs)]  # fmt: skip
    assert 0 <= left < max(0.005 * budget, min(steps))
    assert total_loss(choices, chosen) <= total_loss(choices, greedy(choices, budget))


def test_a_knapsack_is_exact_where_every_cost_has_a_part_of_its_own() -> None:
    choices = many_layers(3)
    scaled: dict[str, Any] = {}
    for name, each in choices.items():
        scaled[name] = Choices(each.shape, each.ranks, tuple(float(round(c / 1000)) for c in each.costs), each.losses)
    budget = round(0.5 * dearest(scaled))
    every = [{"0": a, "1": b, "2": c} for a in range(6) for b in range(6) for c in range(6)]
    fitting = [chosen for chosen in every if total_cost(scaled, chosen) <= budget]
    best = min(total_loss(scaled, chosen) for chosen in fitting)
    assert total_loss(scaled, knapsack(scaled, budget)) == pytest.approx(best)
