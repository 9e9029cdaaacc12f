"""Rounding what a model's statistics know of its layers: whatever form they have, against the objective itself."""

import copy
from typing import Any

import pytest
import torch

from hf_lowrank import CompressionConfig, compress, compute_statistics
from hf_lowrank.compression.codes import coded, measured_to_round, solver_for_codes
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.model.packable import packable
from hf_lowrank.nn.layers_lowrank import dense_weight
from hf_lowrank.solvers.rounding import Grid, Rounded, round_to_nearest
from tests.helpers import outputs, tiny_bert, tiny_llama, token_ids


def prepared(model: Any, **settings: Any) -> tuple[Any, LayerSolver]:
    """A compressed model, and what is known of all its layers that are rounded."""
    config = CompressionConfig(**settings)
    names = measured_to_round(model, config)
    batches = [{"input_ids": token_ids(seed), "labels": torch.tensor([0, 1, 0])} for seed in range(8)]
    if hasattr(model, "lm_head"):
        batches = [{"input_ids": token_ids(seed), "labels": token_ids(seed)} for seed in range(8)]
    statistics = (
        compute_statistics(model, batches, config.needs, include=names, progress=False) if config.needs else None
    )
    small, _ = compress(model, config, statistics, progress=False)
    return small, solver_for_codes(small, config.method, statistics)


def rounded(model: Any, solver: LayerSolver | None, grid: Grid) -> tuple[Any, dict[str, Rounded]]:
    """A copy with rounded weights, and the codes that are not to the nearest."""
    few = copy.deepcopy(model)
    grids = dict.fromkeys(packable(few), grid)
    found = {} if solver is None else coded(few, solver, grids)
    with torch.no_grad():
        for name in grids:
            weight = few.get_submodule(name).weight
            weight.copy_((found.get(name) or round_to_nearest(weight, grid)).weight())
    return few, found


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.5},
        {"keep": 0.5, "form": "interpolative"},
        {"keep": 0.5, "include": ("word_embeddings", "*.dense"), "align": 1},
        {"keep": 0.5, "method": "svd"},
        {"keep": 0.5, "method": "tfwsvd"},
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_lose_no_more_than_by_the_nearest_and_keep_their_mean_output(settings: Any) -> None:
    model, solver = prepared(tiny_bert(initializer_range=0.2), **settings)
    few, found = rounded(model, solver, Grid(4, clipped=True))
    nearest, _ = rounded(model, None, Grid(4, clipped=True))
    assert {name.removesuffix(".up").removesuffix(".rest").removesuffix(".down") for name in found} == set(
        solver.targets
    )
    lost = [0.0, 0.0]
    for name in solver.targets:
        weight, layer = dense_weight(model.get_submodule(name)).double(), few.get_submodule(name)
        sides = solver.sides(name, weight.device)
        changes = [dense_weight(m.get_submodule(name)).double() - weight for m in (few, nearest)]
        errors = [float(sides.error(change)) for change in changes]
        assert errors[0] <= errors[1] * (1 + 1e-6)
        lost = [total + error for total, error in zip(lost, errors, strict=True)]
        if (mean := solver.mean_input(name)) is not None:
            expected = model.get_submodule(name).bias.double() - changes[0] @ mean
            torch.testing.assert_close(layer.bias.double(), expected, rtol=1e-4, atol=1e-6)
    assert lost[0] < 0.9 * lost[1]


def test_layers_without_a_bias_are_rounded_for_whole_inputs() -> None:
    model, solver = prepared(tiny_llama(initializer_range=0.2), keep=0.5)
    few, found = rounded(model, solver, Grid(4, clipped=True))
    assert found
    assert all(solver.mean_input(name) is None for name in solver.targets)
    assert few.state_dict().keys() == model.state_dict().keys()
    nearest, _ = rounded(model, None, Grid(4, clipped=True))
    changes = [(outputs(other) - outputs(model)).norm() for other in (few, nearest)]
    assert changes[0] < changes[1]


def test_what_is_tied_stays_and_layers_without_statistics_are_left_to_others() -> None:
    settings: Any = {"method": "svd", "keep": 0.9, "include": ("embed_tokens",), "align": 1}
    model, solver = prepared(tiny_llama(tie_word_embeddings=True), **settings)
    few, found = rounded(model, solver, Grid(8, clipped=True))
    assert not [name for name in found if "embed" in name or "head" in name]
    assert torch.equal(few.model.embed_tokens.down.weight, model.model.embed_tokens.down.weight)
    left = next(iter(solver.targets))
    known = {name: target for name, target in solver.targets.items() if name != left}
    _, found = rounded(model, LayerSolver(known, solver.method, solver.statistics), Grid(8, clipped=True))
    assert not [name for name in found if name.startswith(left)]


def test_a_layer_that_no_sample_reached_is_left_to_others() -> None:
    model, solver = prepared(tiny_bert(), keep=0.5)
    assert solver.statistics is not None
    name = "bert.encoder.layer.0.attention.self.query"
    solver.statistics.sums["gradient_moment"][name] = torch.zeros_like(solver.statistics.sums["gradient_moment"][name])
    _, found = rounded(model, solver, Grid(4))
    assert f"{name}.up" not in found
    assert f"{name}.up".replace("query", "value") in found
