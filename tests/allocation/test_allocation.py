"""Every allocation within its budget; greedy and knapsack against exhaustive search; budgets in a person's units."""

import itertools

import pytest
import torch

from hf_lowrank import METHODS, CompressionConfig, LowRankError, compress, compute_statistics
from hf_lowrank.allocation import (
    ALLOCATIONS,
    Budget,
    ImpossibleBudget,
    Layer,
    Ranks,
    Spread,
    allocate,
    parameters,
    parse_count,
)
from hf_lowrank.allocation.choices import layer_choices
from hf_lowrank.compression.latency import measured_latency
from hf_lowrank.model.targets import find_targets
from hf_lowrank.solvers import loss_per_error
from tests.helpers import modules_of, tiny_bert, token_ids

SHAPES = {"a": (8, 8), "b": (8, 16), "c": (16, 8)}  # (out, in)
DENSE = 64 + 128 + 128
LAYERS = {name: Layer(shape) for name, shape in SHAPES.items()}
OTHERS = 100  # parameters of the rest of the model


def spectra(seed: int, power: float = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(8, generator=generator).exp().pow(power).sort(descending=True).values.double()
        for name in SHAPES
    }


def ranks_at(budget: Budget, weights: dict[str, torch.Tensor] | None = None, **spread: object) -> Ranks:
    weights = weights or spectra(0)
    profile = {name: {rank: float(values[rank:].sum()) for rank in range(1, 9)} for name, values in weights.items()}
    return allocate(LAYERS, DENSE + OTHERS, budget, Spread(**spread), weights.__getitem__, profile)  # type: ignore[arg-type]


def spent(ranks: Ranks) -> int:
    return sum(parameters(SHAPES[name], rank) for name, rank in ranks.items())


def loss(ranks: Ranks, weights: dict[str, torch.Tensor]) -> float:
    return sum(0.0 if rank is None else float(weights[name][rank:].sum()) for name, rank in ranks.items())


def best_loss(budget: int, weights: dict[str, torch.Tensor]) -> float:
    every = (dict(zip(SHAPES, each, strict=True)) for each in itertools.product([*range(1, 9), None], repeat=3))
    return min(loss(ranks, weights) for ranks in every if spent(ranks) <= budget)


@pytest.mark.parametrize("power", [1, 6])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [100, 150, 230, 300])
def test_greedy_and_knapsack_are_near_the_best_there_is(seed: int, budget: int, power: float) -> None:
    weights = spectra(seed, power)
    best = best_loss(budget, weights)
    exact = ranks_at(Budget("params", OTHERS + budget), weights, allocation="knapsack")
    assert spent(exact) <= budget
    assert loss(exact, weights) == pytest.approx(best)
    greedy = ranks_at(Budget("params", OTHERS + budget), weights, allocation="greedy")
    assert spent(greedy) <= budget
    # The last edge of a hull may not fit: from break-even to dense that is several directions.
    largest = max(float(values[4:].sum()) for values in weights.values())
    assert best <= loss(greedy, weights) + 1e-9 <= best + largest


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("kind", ["rank_ratio", "keep", "keep_model", "params", "flops"])
def test_no_allocation_exceeds_its_budget(allocation: str, kind: str) -> None:
    values = {"rank_ratio": 0.4, "keep": 0.7, "keep_model": 0.8, "params": 330, "flops": 460}
    most = {"keep": 0.7 * DENSE, "keep_model": 0.8 * (DENSE + OTHERS) - OTHERS, "params": 330 - OTHERS, "flops": 230}
    ranks = ranks_at(Budget(kind, values[kind]), allocation=allocation)
    assert set(ranks) == set(SHAPES)
    assert spent(ranks) <= most.get(kind, DENSE)
    if kind in most and allocation in ("greedy", "knapsack"):
        assert spent(ranks) > most[kind] - 2 * 24


def test_uniform_gives_all_layers_the_ratio_and_leaves_those_at_break_even_dense() -> None:
    assert ranks_at(Budget("rank_ratio", 0.25)) == {"a": 2, "b": 2, "c": 2}
    assert ranks_at(Budget("rank_ratio", 0.5)) == {"a": None, "b": 4, "c": 4}
    assert ranks_at(Budget("rank_ratio", 0.01)) == {"a": 1, "b": 1, "c": 1}
    assert ranks_at(Budget("rank_ratio", 1.0)) == {"a": None, "b": None, "c": None}


def test_greedy_follows_the_expected_loss() -> None:
    weights = {"a": torch.full((8,), 1.0), "b": torch.full((8,), 100.0), "c": torch.full((8,), 1.0)}
    ranks = ranks_at(Budget("params", OTHERS + 16 + 24 + 24 + 3 * 24), weights, allocation="greedy")
    assert ranks == {"a": 1, "b": 4, "c": 1}


def test_a_flat_spectrum_is_worth_keeping_dense() -> None:
    """Beyond break-even all the rest costs less than its directions one by one."""
    weights = {"a": torch.ones(8), "b": torch.ones(8) * 0.6, "c": torch.ones(8) * 0.6}
    ranks = ranks_at(Budget("params", OTHERS + 64 + 24 + 24), weights, allocation="greedy")
    assert ranks == {"a": None, "b": 1, "c": 1}


def test_effective_ranks_share_in_proportion_to_the_entropy() -> None:
    weights = {"a": torch.tensor([1.0] + [1e-9] * 7), "b": torch.ones(8), "c": torch.ones(8)}
    ranks = ranks_at(Budget("params", OTHERS + 16 + 2 * 4 * 24), weights, allocation="effective-rank")
    assert ranks == {"a": 1, "b": 4, "c": 4}


def test_layers_of_one_type_move_together() -> None:
    layers = {f"{n}.{kind}": Layer((8, 8)) for n in range(3) for kind in "qv"}
    weights = {name: torch.arange(8, 0, -1.0) * (2 + n if name.endswith("q") else 1) for n, name in enumerate(layers)}
    ranks = allocate(layers, 6 * 64, Budget("keep", 0.6), Spread("type-wise"), weights.__getitem__)
    assert len({ranks[f"{n}.q"] for n in range(3)}) == len({ranks[f"{n}.v"] for n in range(3)}) == 1
    assert ranks["0.q"] is None or ranks["0.q"] > (ranks["0.v"] or 0)


@pytest.mark.parametrize("allocation", ["uniform", "greedy", "type-wise", "effective-rank"])
def test_ranks_are_multiples_within_the_same_budget(allocation: str) -> None:
    shapes = {"a": (64, 64), "b": (64, 256), "c": (256, 64)}
    layers = {name: Layer(shape) for name, shape in shapes.items()}
    weights = {
        name: torch.rand(64, generator=torch.Generator().manual_seed(0)).sort(descending=True).values for name in shapes
    }
    dense = sum(out * in_ for out, in_ in shapes.values())
    ranks = allocate(layers, dense, Budget("keep", 0.5), Spread(allocation, align=8), weights.__getitem__)
    assert all(rank is None or rank % 8 == 0 for rank in ranks.values())
    used = sum(parameters(shapes[name], rank) for name, rank in ranks.items())
    assert 0.5 * dense - 8 * 640 < used <= 0.5 * dense


def test_ranks_are_aligned_by_default_where_that_is_faster() -> None:
    weights = {"a": torch.rand(64).sort(descending=True).values.double().exp().pow(8)} | {"b": torch.ones(63)}
    layers = {"a": Layer((64, 256)), "b": Layer((63, 256))}
    size, budget = 256 * (64 + 63), Budget("keep", 0.5)
    for allocation in ("greedy", "type-wise", "effective-rank"):
        ranks = allocate(layers, size, budget, Spread(allocation), weights.__getitem__)
        assert ranks["a"] is None or ranks["a"] % 8 == 0
        assert allocate(layers, size, budget, Spread(allocation, 1), weights.__getitem__) != ranks
    assert Spread("greedy").ranks((256, 64)) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 40, 48, 56, 64]
    for spread, shape in ((Spread("uniform"), (256, 64)), (Spread("greedy"), (256, 63)), (Spread("greedy", 1), (9, 9))):
        assert list(spread.ranks(shape)) == list(range(1, min(shape) + 1))
    assert list(Spread("uniform", 8).ranks((20, 20))) == [8, 16]


def test_the_smallest_budgets_can_be_met_by_aligned_ranks() -> None:
    layers = {name: Layer((64, 64)) for name in "ab"}
    weights = {"a": torch.ones(64).double(), "b": torch.ones(64).double() / 9}
    assert allocate(layers, 8192, Budget("rank_ratio", 0.05), Spread("greedy"), weights.__getitem__) == {"a": 5, "b": 1}
    bounds = Spread("greedy", floor=0.9, cap=1.1)  # around 13 lies no multiple of 8
    assert allocate(layers, 8192, Budget("rank_ratio", 0.2), bounds, weights.__getitem__) == {"a": 8, "b": 8}


def test_layers_without_a_multiple_stay_dense() -> None:
    layers = {"a": Layer((64, 64)), "b": Layer((6, 64))}
    for allocation in ("uniform", "greedy"):
        spread = Spread(allocation, align=8)
        ranks = allocate(layers, 4480, Budget("keep", 0.5), spread, lambda name: torch.ones(64 if name == "a" else 6))
        assert ranks == {"a": 8, "b": None}


def test_profiles_without_ranks_for_the_budget_are_refused() -> None:
    layers = {"a": Layer((64, 64)), "head": Layer((1, 64))}
    profile: dict[str, dict[int, float]] = {"a": {8: 2.0, 16: 1.0}, "head": {}}  # no rank of the head saves anything
    size, spread = 64 * 65, Spread("knapsack")
    assert allocate(layers, size, Budget("keep", 0.6), spread, None, profile) == {"a": 16, "head": None}
    with pytest.raises(ImpossibleBudget, match=r"keep 0\.2 cannot be met by the ranks that were profiled"):
        allocate(layers, size, Budget("keep", 0.2), spread, None, profile)
    with pytest.raises(LowRankError, match="a: the profile has no measured loss at a rank"):
        allocate(layers, size, Budget("keep", 1), spread, None, {"a": {9: 2.0, 17: 1.0}, "head": {}})


def test_floor_and_cap_bound_the_ranks_around_the_uniform_one() -> None:
    shapes = {"a": (64, 64), "b": (64, 64)}
    layers = {name: Layer((64, 64)) for name in shapes}
    weights = {"a": torch.ones(64), "b": torch.ones(64) * 1e-6}
    free, bounded = (
        allocate(layers, 8192, Budget("rank_ratio", 0.25), Spread("greedy", **bounds), weights.__getitem__)
        for bounds in ({"align": 1}, {"align": 1, "floor": 0.5, "cap": 1.25})
    )
    assert free["b"] == 1
    assert bounded == {"a": 20, "b": 12}  # of 16


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget("params", 163), "params 163 cannot be met: it must be between 164 (the smallest ranks) and 420"),
        (Budget("params", 421), "params 421 cannot be met"),
        (Budget("keep", 0.1), "keep 0.1000 cannot be met: it must be between 0.2000 (the smallest ranks) and 1.0000"),
        (Budget("keep_model", 0.2), "keep_model 0.2000 cannot be met: it must be between 0.3905"),
        (Budget("flops", 100), "flops 100 cannot be met: it must be between 128 (the smallest ranks) and 640"),
    ],
)
def test_impossible_budgets_are_refused_with_the_range(budget: Budget, message: str) -> None:
    for allocation in ALLOCATIONS:
        with pytest.raises(LowRankError) as raised:
            ranks_at(budget, allocation=allocation)
        assert message in str(raised.value)


def test_bad_settings_are_refused() -> None:
    for arguments, message in (
        ({"rank_ratio": 0.3, "keep": 0.5}, "give one budget, not 2: rank_ratio, keep"),
        (
            {"keep": 1.5},
            "keep must be in (0, 1], share to keep of the targeted layers' parameters",
        ),
        ({"params": "many"}, "'many' is not a count"),
        ({"align": 0}, "align must be at least 1"),
        ({"floor": 2}, "floor in [0, 1]"),
        ({"cap": 0.5}, "cap at least 1"),
        ({"allocation": "best"}, "unknown allocation 'best'; there are uniform, greedy"),
        ({"gauge": "sharp"}, "unknown gauge 'sharp'; there are flat, balanced"),
        ({"gauge": "balanced", "form": "interpolative"}, "the interpolative form has a basis of its own"),
        ({"optimizer": "adam"}, "kfac has a closed form; an optimizer is for tfwsvd, ekfac"),
    ):
        with pytest.raises(LowRankError) as raised:
            CompressionConfig(**arguments)  # type: ignore[arg-type]
        assert message in str(raised.value)
    with pytest.raises(LowRankError, match="a: the profile has no measured loss"):
        allocate(LAYERS, DENSE, Budget("keep", 0.5), Spread("knapsack"))


def test_counts_are_read_as_people_write_them() -> None:
    assert [parse_count(text) for text in ("66.5M", "7B", "12k", 300, "300")] == [66.5e6, 7e9, 12e3, 300, 300]


def test_the_time_of_a_layer_rises_with_its_rank() -> None:
    shape = (512, 512)
    cost = measured_latency([Layer(shape)], torch.float32, torch.device("cpu"))
    times = [cost(shape, rank) for rank in (1, 64, 128, 512)]
    assert times == sorted(times)
    assert 0 < times[0] < cost(shape, None) < times[-1]


def test_time_is_a_budget_too() -> None:
    layers = {name: Layer((1024, 1024)) for name in "ab"}
    weights = {"a": torch.ones(1024) * 2, "b": torch.ones(1024)}
    budget, spread = Budget("latency", 0.7), Spread("greedy", align=64)
    with pytest.raises(LowRankError, match="a latency budget needs the time that layers take"):
        allocate(layers, 2 << 20, budget, spread, weights.__getitem__)
    times = measured_latency(layers.values(), torch.float32, torch.device("cpu"))
    ranks = allocate(layers, 2 << 20, budget, spread, weights.__getitem__, latency=times)
    assert ranks["b"] is not None
    assert ranks["b"] < (ranks["a"] or 1024)


def test_choices_are_those_that_cost_less_and_lose_the_tail() -> None:
    choices = layer_choices((8, 8), parameters, spectrum=[8, 4, 2, 1, 0.5, 0.25, 0.125, 0.125])
    assert choices.ranks == (1, 2, 3, None)
    assert choices.costs == (16, 32, 48, 64)
    assert choices.losses == (8, 4, 2, 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_random_change_costs_what_the_fisher_information_says(method: str) -> None:
    """In every method's own units: errors times `loss_per_error`, on average over changes of variance 1."""
    model = tiny_bert()
    batch = {"input_ids": token_ids(batch=8), "labels": torch.arange(8) % 2}
    name, shape = "bert.encoder.layer.0.output.dense", (32, 64)
    needs = METHODS[method].needs_for(losses=True)
    statistics = compute_statistics(model, [batch], [*needs, "fisher_rows"], progress=False)
    objective = METHODS[method].objective({kind: statistics.mean(kind, name) for kind in METHODS[method].needs})
    rows = statistics.mean("fisher_rows", name)
    generator = torch.Generator().manual_seed(0)
    errors = [float(objective.error(torch.randn(shape, generator=generator))) for _ in range(300)]
    unit = loss_per_error(objective, rows, shape)
    assert sum(errors) / 300 * unit == pytest.approx(float(rows.sum()), rel=0.15)
    if METHODS[method].in_loss_units and "activation_moment" not in METHODS[method].needs:
        assert unit == pytest.approx(1, rel=1e-3)  # the diagonal Fisher itself


def test_the_report_says_what_loss_is_expected() -> None:
    model = tiny_bert()
    batch = {"input_ids": token_ids(batch=8), "labels": torch.arange(8) % 2}
    statistics = compute_statistics(model, [batch], ["fisher"], progress=False)
    discarded = []
    for name, module in modules_of(find_targets(model)).items():
        spectrum = (
            METHODS["fwsvd2"].objective({"fisher": statistics.mean("fisher", name)}).spectrum(module.weight.detach())
        )
        discarded.append(float(spectrum[8:].sum()) / 2)
    _, report = compress(model, CompressionConfig("fwsvd2", 0.25), statistics, progress=False)
    assert [layer.expected_loss for layer in report.layers] == pytest.approx(discarded, rel=0.05)
    assert report.expected_loss == pytest.approx(sum(discarded), rel=0.05)
    _, report = compress(tiny_bert(), CompressionConfig("svd", 0.25), progress=False)
    assert report.expected_loss is None  # plain SVD knows no loss


def test_a_greedy_model_is_as_large_as_a_uniform_one() -> None:
    sizes = {}
    for allocation in ("uniform", "greedy"):
        model = tiny_bert()
        batch = {"input_ids": token_ids(), "labels": torch.tensor([0, 1, 0])}
        statistics = compute_statistics(model, [batch], ["fisher_rows"], progress=False)
        _, report = compress(model, CompressionConfig("svd", 0.25, allocation), statistics, progress=False)
        sizes[allocation] = report.parameters_after
        assert report.settings["allocation"] == allocation
    assert 0 <= sizes["uniform"] - sizes["greedy"] < 96


def test_every_rank_is_a_candidate_unless_told_otherwise() -> None:
    def cost(shape: tuple[int, int], rank: int | None) -> float:
        return 10 if rank is None else rank

    assert layer_choices((4, 6), cost).ranks == (1, 2, 3, 4, None)
