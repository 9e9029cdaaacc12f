"""low-rank model + what its directions are worth + a smaller budget → the same model at smaller ranks, without data."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.allocation import Budget, allocate
from hf_lowrank.allocation.budget import ImpossibleBudget
from hf_lowrank.allocation.costs import Layer, parameters, parameters_at
from hf_lowrank.allocation.ranks import uniform_ranks
from hf_lowrank.compression.compress import checked_targets, earlier_steps
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.directions import Directions
from hf_lowrank.compression.report import CompressionReport, LayerReport
from hf_lowrank.compression.solution import kept_report
from hf_lowrank.compression.uses import as_layer
from hf_lowrank.errors import LowRankError
from hf_lowrank.model.targets import Target, dense_parameters, factorized_layers
from hf_lowrank.model.weights import placed_like
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.solvers.factors import Factors

POSSIBLE = ("rank_ratio", "keep", "keep_model", "params")  # budgets of parameters


def shrink(
    model: PreTrainedModel, directions: Mapping[str, Directions], config: CompressionConfig
) -> tuple[PreTrainedModel, CompressionReport]:
    """Cut a low-rank model to a smaller budget, in place, by dropping the directions that are worth least.

    The allocation is that of `config`, on the worth that `compress` found (`CompressionReport.directions`). A layer
    whose directions are not known, such as one that stayed dense, stays as it is, and counts.

    Args:
        model: low-rank, with the factors that `compress` made.
        directions: of its layers, by name.
        config: that of the compression with another budget, of parameters.

    Raises:
        LowRankError: no layer's directions are known; another kind of budget, or one that cannot be met.
    """
    targets, started = checked_targets(model, config), time.perf_counter()
    known = {name: target for name, target in targets.items() if name in directions}
    if not known:
        raise LowRankError("it is not known of any layer what its directions are worth: compress the dense model anew")
    before, earlier = dense_parameters(model), earlier_steps(model, factorized_layers(model))
    layers = {name: as_layer(target) for name, target in known.items()}
    budget = _of_model(config, model, {name: as_layer(target) for name, target in targets.items()})
    spectrum = {name: _spectrum(directions[name], layer) for name, layer in layers.items()}
    saved = before - model.num_parameters()
    try:
        ranks = allocate(layers, before, budget, config.spread, spectrum.__getitem__, saved=saved)
    except ImpossibleBudget as error:
        given = f"{config.budget.kind} {config.budget.value:g} cannot be met: " if budget != config.budget else ""
        raise ImpossibleBudget(f"{given}{error}") from None
    left: dict[str, Directions] = {}
    reports = {name: kept_report(target) for name, target in targets.items()}
    for name, rank in ranks.items():
        left[name] = directions[name]
        if rank is not None:
            reports[name], left[name] = _cut(model, known[name], directions[name], rank)
    others = {name: layer for name, layer in factorized_layers(model).items() if name not in targets}
    rest = tuple(kept_report(Target.of(name, layer)) for name, layer in others.items())
    report = CompressionReport(
        asdict(config),
        before,
        model.num_parameters(),
        time.perf_counter() - started,
        tuple(reports.values()),
        earlier=earlier,
        untouched=rest,
        directions=left,
    )
    model.compression_report = report  # type: ignore[assignment]
    return model, report


def _of_model(config: CompressionConfig, model: PreTrainedModel, layers: Mapping[str, Layer]) -> Budget:
    """The budget in parameters of the whole model, so that layers that stay as they are count as they do in it."""
    budget = config.budget
    if budget.kind not in POSSIBLE:
        raise LowRankError(f"a {budget.kind} budget needs a measurement: shrink by {', '.join(POSSIBLE)}")
    every_layer = budget.kind == "rank_ratio" and config.allocation == "uniform"  # is a rank, and no sum
    if budget.kind in ("keep_model", "params") or every_layer:
        return budget
    shapes = {name: layer.shape for name, layer in layers.items()}
    if budget.kind == "keep":
        allowed = budget.value * sum(parameters(shape, None) for shape in shapes.values())
    else:
        ranks = uniform_ranks(shapes, budget.value)
        allowed = float(sum(parameters_at(shape, ranks[name]) for name, shape in shapes.items()))
    present = sum(parameters(layer.shape, layer.rank) for layer in layers.values())
    return Budget("params", model.num_parameters() - present + allowed)


def _spectrum(directions: Directions, layer: Layer) -> list[float]:
    """The worth of all directions that the dense layer had, those that are gone being 0."""
    worth = directions.worth.double().tolist()
    return worth + [0.0] * (min(layer.shape) - len(worth))


@torch.no_grad()
def _cut(model: PreTrainedModel, target: Target, directions: Directions, rank: int) -> tuple[LayerReport, Directions]:
    """Put smaller factors in the place of a layer; what it loses is relative to its larger factors."""
    layer: Any = target.module
    factors = Factors(*(matrix.detach().float() for matrix in layer.matrices()))
    smaller, left, lost_mean = directions.truncated(factors, rank)
    cut: Any = placed_like(layer, {"up": smaller.up, "down": smaller.down})
    if isinstance(bias := getattr(cut, "bias", None), Tensor) and directions.mean.any():
        bias.data.add_(lost_mean.to(bias))
    replace_module(model, target.name, cut)
    product = factors.product().double()
    lost, whole = directions.worth[rank:].double().sum(), directions.worth.double().sum()
    report = LayerReport(
        target.name,
        *target.shape,
        rank,
        parameters(target.shape, None),
        parameters(target.shape, rank),
        relative_error=float((product - smaller.product()).norm() / product.norm().clamp_min(1e-30)),
        weighted_error=float((lost / whole.clamp_min(1e-30)).sqrt()),
        expected_loss=float(lost),
    )
    return report, left
