"""Score against the share of the ranks kept, by method: FWSVD's figure 5 with every method on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hf_lowrank.allocation import parameters, saves_parameters, uniform_ranks
from hf_lowrank.model.targets import weight_shape
from hf_lowrank.studies.analysis.evaluator import Measurement
from hf_lowrank.studies.analysis.study import Change, Study


@dataclass(frozen=True)
class SweepPoint:
    """A method at a rank ratio, the same in every layer; `targeted_share` of the targeted parameters are left."""

    method: str
    rank_ratio: float
    targeted_share: float
    measured: Measurement


def rank_sweep(study: Study, method: str, ratios: Sequence[float]) -> list[SweepPoint]:
    """Measure the model with all layers factorized at each ratio, without fine-tuning.

    As in `compress` with uniform ranks, a layer at break-even stays dense.
    """
    shapes = {name: weight_shape(module) for name, module in study.targets.items()}
    before = sum(parameters(shape, None) for shape in shapes.values())
    points = []
    for ratio in ratios:
        ranks = {name: _kept(shapes[name], rank) for name, rank in uniform_ranks(shapes, ratio).items()}
        key = {"study": "ranks", "method": method, "rank_ratio": ratio}
        measured, _ = study.measure(key, partial(_factorized, study, method, ranks))
        after = sum(parameters(shape, ranks[name]) for name, shape in shapes.items())
        points.append(SweepPoint(method, ratio, after / before, measured))
    return points


@torch.no_grad()
def _factorized(study: Study, method: str, ranks: Mapping[str, int | None]) -> Change:
    """The layers that do not stay dense, as the products of their factors."""
    return {
        name: study.objective(method, name).factorize(study.weight(name), rank).product()
        for name, rank in ranks.items()
        if rank is not None
    }, {}


def _kept(shape: tuple[int, int], rank: int) -> int | None:
    """The rank of a layer, None where it stays dense."""
    return rank if saves_parameters(shape, rank) else None
