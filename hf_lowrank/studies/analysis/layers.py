"""Every matrix alone: what the statistics predict, what compressing it by each method does, and how far they agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_lowrank.allocation import parameters, uniform_ranks
from hf_lowrank.solvers import METHODS
from hf_lowrank.studies.analysis.evaluator import Measurement
from hf_lowrank.studies.analysis.predictor import Correlation, FisherShape, correlate, effective_rank, fisher_shape
from hf_lowrank.studies.analysis.study import Change, Study, relative_error

YARDSTICK = "kfac"  # expected loss increases are by its quadratic model, for all methods


@dataclass(frozen=True)
class LayerMethod:
    """One layer compressed by one method, the others dense.

    `expected_increase` is ½ c E[tr Δᵀ G Δ A] and `expected_elementwise` is ½ c Σ F ∘ Δ², of the change Δ that this
    method makes, in units of the loss; c is `curvature_per_fisher`. `reconstruction_error` is ‖Δ‖ / ‖W‖.
    """

    expected_increase: float
    expected_elementwise: float
    reconstruction_error: float
    measured: Measurement


@dataclass(frozen=True)
class LayerAnalysis:
    """One matrix. `rank` is that of the given ratio, and saves so many parameters: 0 where it would add some.

    Effective ranks are between 1 and min(out, in). `least_expected_increase` is that of the best Δ there is at the
    rank, and `share` the layer's part of its sum over layers: the redundancy map.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    parameters_saved: int
    fisher: FisherShape
    effective_rank: float
    whitened_effective_rank: float
    least_expected_increase: float
    share: float
    methods: dict[str, LayerMethod]


def analyze_layers(study: Study, methods: Sequence[str], rank_ratio: float) -> list[LayerAnalysis]:
    """Describe every matrix, and measure the model with it alone compressed by each method."""
    shapes = {name: target.shape for name, target in study.targets.items()}
    ranks = uniform_ranks(shapes, rank_ratio)
    spectra = {name: study.objective(YARDSTICK, name).spectrum(study.weight(name)) for name in shapes}
    least = {name: float(spectra[name][rank:].sum()) * study.evaluator.curvature / 2 for name, rank in ranks.items()}
    total = sum(least.values()) or 1.0
    return [
        LayerAnalysis(
            name,
            *shapes[name],
            rank,
            max(0, parameters(shapes[name], None) - parameters(shapes[name], rank)),
            fisher_shape(study.statistics.mean("fisher", name)),
            effective_rank(METHODS["svd"].objective({}).spectrum(study.weight(name))),
            effective_rank(spectra[name]),
            least[name],
            least[name] / total,
            {method: _compressed_alone(study, name, method, rank) for method in methods},
        )
        for name, rank in ranks.items()
    ]


def _compressed_alone(study: Study, name: str, method: str, rank: int) -> LayerMethod:
    key = {"study": "layer", "method": method, "layer": name, "rank": rank}
    measured, facts = study.measure(key, partial(_approximated, study, name, method, rank))
    c = study.evaluator.curvature
    return LayerMethod(c * facts["kronecker"], c * facts["elementwise"], facts["reconstruction_error"], measured)


@torch.no_grad()
def _approximated(study: Study, name: str, method: str, rank: int) -> Change:
    weight = study.weight(name)
    approximation = study.objective(method, name).factorize(weight, rank).product().float()
    return {name: approximation}, _facts(study, name, weight - approximation, weight)


def _facts(study: Study, name: str, delta: Tensor, weight: Tensor) -> dict[str, float]:
    return {
        "kronecker": float(study.objective(YARDSTICK, name).error(delta)) / 2,
        "elementwise": float(study.objective("tfwsvd", name).error(delta)) / 2,
        "reconstruction_error": relative_error([(delta, weight)]),
    }


VARIATION, EXPECTED = "variation of Fisher", "expected increase, Kronecker"
SPREAD = "spread of the loss change"

STRUCTURE = {
    VARIATION: lambda layer: layer.fisher.variation,
    "its between-row part": lambda layer: layer.fisher.between_rows,
    "its within-row part": lambda layer: layer.fisher.within_rows,
    "Fisher not rank 1": lambda layer: 1 - layer.fisher.rank1_share,
    "effective rank / full": lambda layer: layer.effective_rank / min(layer.out_features, layer.in_features),
    "whitened effective rank / full": lambda layer: (
        layer.whitened_effective_rank / min(layer.out_features, layer.in_features)
    ),
}
# The last is a standard error, in proportion to how far the change moves single samples' losses, up or down.
OUTCOMES = {"loss_increase": "loss increase", "damage": "damage", "loss_increase_error": SPREAD}
EXPECTATIONS = {
    "reconstruction error": lambda of: of.reconstruction_error,
    "expected increase, element-wise": lambda of: of.expected_elementwise,
    EXPECTED: lambda of: of.expected_increase,
}


def correlations(layers: Sequence[LayerAnalysis]) -> list[Correlation]:
    """How well each number predicts what was measured.

    Outcomes are the loss increase and the damage of each method, the spread of the loss change over samples, and the
    rescue: what plain SVD loses more than a weighted method does. Properties of the matrix are held against SVD and the
    rescues, expectations against each method's own outcome.
    """
    methods = list(layers[0].methods) if layers else []
    found = []
    for method in methods:
        for what, outcome in OUTCOMES.items():
            measured = [getattr(layer.methods[method].measured, what) for layer in layers]
            for name, of in EXPECTATIONS.items():
                found.append(correlate(name, [of(x.methods[method]) for x in layers], f"{method}: {outcome}", measured))
            if method == "svd":
                found += _structure(layers, f"svd: {outcome}", measured)
            elif "svd" in methods:
                plain = [getattr(layer.methods["svd"].measured, what) for layer in layers]
                rescue = [a - b for a, b in zip(plain, measured, strict=True)]
                found += _structure(layers, f"rescue by {method}: {outcome}", rescue)
    return found


def _structure(layers: Sequence[LayerAnalysis], outcome: str, measured: list[float]) -> list[Correlation]:
    return [correlate(name, [of(layer) for layer in layers], outcome, measured) for name, of in STRUCTURE.items()]
