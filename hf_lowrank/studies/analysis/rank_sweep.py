"""Score against the share of the ranks kept, by method: FWSVD's figure 5 with every method on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hf_lowrank.allocation import allocate, parameters
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.compression.uses import as_layer
from hf_lowrank.compression.weighing import Weighing, weighing_for
from hf_lowrank.model.targets import dense_parameters
from hf_lowrank.solvers import get_method
from hf_lowrank.studies.analysis.evaluator import Measurement
from hf_lowrank.studies.analysis.study import Change, Study


@dataclass(frozen=True)
class SweepPoint:
    """A method at a rank ratio, spread as `compress` does by default; `targeted_share` of the parameters are left."""

    method: str
    rank_ratio: float
    targeted_share: float
    measured: Measurement


def rank_sweep(study: Study, method: str, ratios: Sequence[float]) -> list[SweepPoint]:
    """Measure the model as `compress` makes it at each ratio: by the method's own allocation, without fine-tuning."""
    solver = LayerSolver(study.targets, get_method(method), study.statistics)
    weighing = weighing_for(solver, CompressionConfig(method), progress=False, keep="always")
    points = []
    for ratio in ratios:
        config = CompressionConfig(method, ratio)
        key = {"study": "ranks", "method": method, "rank_ratio": ratio, "allocation": config.allocation}
        measured, facts = study.measure(key, partial(_compressed, study, config, weighing))
        points.append(SweepPoint(method, ratio, facts["targeted_share"], measured))
    return points


@torch.no_grad()
def _compressed(study: Study, config: CompressionConfig, weighing: Weighing) -> Change:
    """The layers that do not stay dense, as factors, and the share of the parameters left."""
    layers = {name: as_layer(target) for name, target in study.targets.items()}
    before = dense_parameters(study.evaluator.model)
    ranks = allocate(layers, before, config.budget, config.spread, weighing.spectrum)
    left = sum(parameters(layer.shape, ranks[name]) for name, layer in layers.items())
    share = left / sum(parameters(layer.shape, None) for layer in layers.values())
    factorized = {
        name: weighing.solver.low_rank(name, rank, weighing.decomposition(name))[0]
        for name, rank in ranks.items()
        if rank is not None
    }
    return factorized, {"targeted_share": share}
