"""A model, what its method knows of its layers, and grids → the codes of their weights, biases making up for the mean.

The objective that factors are found by says what their rounding costs (see `hf_lowrank.solvers.rounded_factors`). What
the mean input makes of it is no part of the objective where a layer has a bias, which takes it up.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.model.packable import packable
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.layers_lowrank import InterpolativeLinear, LowRankLayer, dense_weight
from hf_lowrank.solvers import get_method
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.rounded_factors import Grids, round_factors, round_weight
from hf_lowrank.solvers.rounding import Grid, Rounded
from hf_lowrank.statistics import Statistics
from hf_lowrank.statistics.kinds import KINDS


def measured_to_round(model: PreTrainedModel, config: CompressionConfig) -> tuple[str, ...]:
    """The layers of which to measure what `config` needs, by name: its targets, and what else is rounded of the model.

    That is every linear layer of its body and the input embedding, where nothing else has their weight.
    """
    targets, rounded = find_targets(model, config.include, config.exclude), packable(model)
    kinds = (
        ("linear", "expert") if any(KINDS[kind].dense for kind in config.needs) else ("linear", "expert", "embedding")
    )
    others = {
        name: target
        for name, target in find_targets(model, ("*",)).items()
        if name in rounded
        and target.kind in kinds
        and (target.kind != "embedding" or target.module is model.get_input_embeddings())
    }
    return tuple(targets | others)


def solver_for_codes(model: PreTrainedModel, method: str, statistics: Statistics | None) -> LayerSolver:
    """What is known of the layers of a model, by statistics of it or, where layers are factorized, of the dense one.

    Raises:
        LowRankError: the statistics are of other layers, shapes or weights, or lack what the method needs.
    """
    names = None if statistics is None else tuple(statistics.weights)
    targets = {name: target for name, target in find_targets(model, names).items() if target.owner is None}
    chosen = get_method(method)
    if statistics is not None:
        dense = {name: target for name, target in targets.items() if target.rank is None}
        statistics.check(dense, chosen.needs)
        statistics.check_shapes(targets, chosen.needs)
    return LayerSolver(targets, chosen, statistics)


@torch.no_grad()
def coded(model: PreTrainedModel, solver: LayerSolver, grids: Mapping[str, Grid]) -> dict[str, Rounded]:
    """The weights of the layers of `solver` on `grids`, by module, of which a factor is one.

    Biases change in place, and of an embedding the factor that is not rounded. Layers that no sample reached are left
    to others.
    """
    found: dict[str, Rounded] = {}
    for name in solver.targets:
        layer: Any = model.get_submodule(name)
        if not solver.reaches(name):
            continue
        if isinstance(layer, LowRankLayer):
            found |= _factors(name, layer, solver, grids)
        elif name in grids:
            found |= _dense(name, layer, solver, grids[name])
    return found


def _factors(name: str, layer: Any, solver: LayerSolver, grids: Mapping[str, Grid]) -> dict[str, Rounded]:
    """Of a low-rank layer, if its `down` has a grid."""
    partial = isinstance(layer, InterpolativeLinear)
    up_name, down_name = f"{name}.up", f"{name}.down.rest" if partial else f"{name}.down"
    if down_name not in grids:
        return {}
    columns = layer.down.order[layer.rank :].long() if partial else None
    shape = Grids(grids.get(up_name), grids[down_name], _is_lookup(name, solver), columns)
    before = Factors(*(factor.double() for factor in layer.matrices()))
    rounded = round_factors(before, solver.sides(name, before.up.device), shape)
    _correct_bias(layer, solver, name, before.product() - rounded.factors.product())
    if rounded.up is None:
        layer.up.weight.copy_(rounded.factors.up)
        return {down_name: rounded.down}
    return {up_name: rounded.up, down_name: rounded.down}


def _dense(name: str, layer: Any, solver: LayerSolver, grid: Grid) -> dict[str, Rounded]:
    """Of a layer that is not factorized."""
    weight, lookup = dense_weight(layer).double(), _is_lookup(name, solver)
    rounded = round_weight(weight, solver.sides(name, weight.device), grid, lookup)
    values = rounded.weight().T if lookup else rounded.weight()
    _correct_bias(layer, solver, name, weight - values)
    return {name: rounded}


def _is_lookup(name: str, solver: LayerSolver) -> bool:
    return solver.targets[name].kind == "embedding"


def _correct_bias(layer: Any, solver: LayerSolver, name: str, change: Tensor) -> None:
    """Let the bias make up for what a change [out, in] of the weight makes of the mean input."""
    mean = solver.mean_input(name)
    if mean is not None:
        layer.bias.add_((change @ mean.to(change)).to(layer.bias))
