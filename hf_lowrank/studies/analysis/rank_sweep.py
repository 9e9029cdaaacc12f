"""Score against the share of the ranks kept, by method: FWSVD's figure 5 with every method on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from hf_lowrank.allocation import allocate, parameters
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.model.targets import dense_parameters, weight_shape
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
    spectrum = cache(LayerSolver(study.targets, get_method(method), study.statistics).spectrum)
    points = []
    for ratio in ratios:
        config = CompressionConfig(method, ratio)
        key = {"study": "ranks", "method": method, "rank_ratio": ratio, "allocation": config.allocation}
        measured, facts = study.measure(key, partial(_compressed, study, config, spectrum))
        points.append(SweepPoint(method, ratio, facts["targeted_share"], measured))
    return points


@torch.no_grad()
def _compressed(study: Study, config: CompressionConfig, spectrum: Callable[[str], Tensor]) -> Change:
    """The layers that do not stay dense, as the products of their factors, and the share of the parameters left."""
    shapes = {name: weight_shape(module) for name, module in study.targets.items()}
    before = dense_parameters(study.evaluator.model)
    ranks = allocate(study.targets, before, config.budget, config.spread, spectrum)
    left = sum(parameters(shape, ranks[name]) for name, shape in shapes.items())
    return {
        name: study.objective(config.method, name).factorize(study.weight(name), rank).product()
        for name, rank in ranks.items()
        if rank is not None
    }, {"targeted_share": left / sum(parameters(shape, None) for shape in shapes.values())}
