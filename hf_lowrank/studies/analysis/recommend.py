"""What was measured and expected → what to do: with the model at a rank ratio, and with each layer."""

from collections.abc import Sequence

from hf_lowrank.studies.analysis.evaluator import Baseline
from hf_lowrank.studies.analysis.layers import LayerAnalysis
from hf_lowrank.studies.analysis.rank_sweep import SweepPoint
from hf_lowrank.tasks import Task

SVD_ENOUGH, USE_WEIGHTING, LEAVE_DENSE = "plain SVD is enough", "use weighting", "leave dense or keep more ranks"

TOLERATED = 0.01  # of the dense score; of a perplexity's logarithm, 0.01 nats, which is 1% too
EXPENSIVE = 3.0  # times the mean price of a saved parameter

LAYER_RULE = (
    "The price of a layer is its expected loss increase per parameter saved. Where even its best method costs more "
    f"than {EXPENSIVE:g} times the mean price over all layers, or where the rank saves nothing: {LEAVE_DENSE}. Where "
    f"plain SVD costs no more than that mean price: {SVD_ENOUGH}. Elsewhere: {USE_WEIGHTING}."
)
MODEL_RULE = (
    f"A loss is tolerable up to {TOLERATED:.0%} of the dense score, or up to two standard errors where the samples "
    f"cannot tell that little. Plain SVD if its loss is tolerable at this rank ratio, else the best weighted method."
)


def recommend_layers(layers: Sequence[LayerAnalysis]) -> dict[str, str]:
    """A recommendation for each layer, by `LAYER_RULE`: from expectations alone, so that it needs no evaluation."""
    best = {layer.name: min(of.expected_increase for of in layer.methods.values()) for layer in layers}
    saved = sum(layer.parameters_saved for layer in layers)
    price = sum(best[layer.name] for layer in layers if layer.parameters_saved) / max(saved, 1)

    def advice(layer: LayerAnalysis) -> str:
        fair = price * layer.parameters_saved
        if not layer.parameters_saved or best[layer.name] > EXPENSIVE * fair:
            return LEAVE_DENSE
        plain = layer.methods.get("svd")
        return SVD_ENOUGH if plain is not None and plain.expected_increase <= fair else USE_WEIGHTING

    return {layer.name: advice(layer) for layer in layers}


def recommend_model(points: Sequence[SweepPoint], rank_ratio: float, dense: Baseline, task: Task) -> str:
    """One sentence, by `MODEL_RULE`, from the sweep's measurements at the rank ratio."""
    here = {point.method: point for point in points if point.rank_ratio == rank_ratio}
    best = min(here.values(), key=lambda point: point.measured.damage)
    plain = here.get("svd")
    at = f"With {rank_ratio:.0%} of the ranks in every layer"
    if plain is not None and _tolerable(plain, dense, task):
        return f"{at}, plain SVD is enough: {_outcome(plain, dense, task)}."
    scale = "" if plain is None else f" Plain SVD: {_outcome(plain, dense, task)}."
    if _tolerable(best, dense, task):
        return f"{at}, use weighting: {best.method} is the best, {_outcome(best, dense, task)}.{scale}"
    return (
        f"{at}, even the best method, {best.method}, is not free: {_outcome(best, dense, task)}.{scale} Keep more "
        "ranks, spread them by importance (--allocation greedy), or fine-tune afterwards."
    )


def _tolerable(point: SweepPoint, dense: Baseline, task: Task) -> bool:
    return point.measured.damage <= max(_allowed(dense, task), 2 * point.measured.damage_error)


def _allowed(dense: Baseline, task: Task) -> float:
    return TOLERATED if task.lower_is_better else TOLERATED * abs(dense.score)


def _outcome(point: SweepPoint, dense: Baseline, task: Task) -> str:
    unit = "nats of log perplexity" if task.lower_is_better else "points"
    measured = point.measured
    verb = "loses" if measured.damage > 0 else "gains"
    unsure = _allowed(dense, task) < measured.damage <= 2 * measured.damage_error
    caution = f", as far as {dense.samples} samples can tell" if unsure else ""
    return f"it {verb} {abs(measured.damage):.3g} ± {measured.damage_error:.2g} {unit} without fine-tuning{caution}"
