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
    f"cannot tell that little. Plain SVD if its loss is tolerable at this rank ratio, else the best weighted method, "
    "at the next larger ratio that was measured where its loss is not tolerable at this one."
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


def recommended_point(points: Sequence[SweepPoint], rank_ratio: float, dense: Baseline, task: Task) -> SweepPoint:
    """The method and rank ratio to compress with, by `MODEL_RULE`; the best at `rank_ratio` if nothing is tolerable."""
    for ratio in sorted({point.rank_ratio for point in points if point.rank_ratio >= rank_ratio}):
        chosen = _chosen(points, ratio, dense, task)
        smaller = ratio == rank_ratio or chosen.targeted_share < 1
        if smaller and _tolerable(chosen, dense, task):
            return chosen
    return _chosen(points, rank_ratio, dense, task)


def _chosen(points: Sequence[SweepPoint], ratio: float, dense: Baseline, task: Task) -> SweepPoint:
    """Plain SVD if its loss is tolerable at a ratio, else the method that loses least."""
    here = [point for point in points if point.rank_ratio == ratio]
    plain = next((point for point in here if point.method == "svd"), None)
    if plain is not None and _tolerable(plain, dense, task):
        return plain
    return min(here, key=lambda point: point.measured.damage)


def recommend_model(points: Sequence[SweepPoint], rank_ratio: float, dense: Baseline, task: Task) -> str:
    """What to do, by `MODEL_RULE`, from the sweep's measurements."""
    best, advised = _chosen(points, rank_ratio, dense, task), recommended_point(points, rank_ratio, dense, task)
    at = f"Keeping {rank_ratio:.0%} of the ranks"
    others = [point for point in points if point.rank_ratio == rank_ratio and point.method == "svd" != best.method]
    plain = "".join(f" Plain SVD: it {_outcome(point, dense, task)}." for point in others)
    told = f"it {_outcome(best, dense, task)}, before any fine-tuning.{plain}"
    if not _tolerable(best, dense, task):
        return f"{at}, even the best method, {best.method}, is not free: {told} {_way_out(advised, best, dense, task)}"
    if best.method == "svd":
        return f"{at}, plain SVD is enough: {told}"
    return f"{at}, use weighting by {best.method}, the best method here: {told}"


def _way_out(advised: SweepPoint, best: SweepPoint, dense: Baseline, task: Task) -> str:
    if advised == best:
        return "No larger share that was tried is good enough either: fine-tune afterwards, or leave the model dense."
    kept = f"{advised.rank_ratio:.0%} of the ranks by {advised.method}"
    return f"Fine-tune afterwards, or keep {kept}, which {_outcome(advised, dense, task)}."


def _tolerable(point: SweepPoint, dense: Baseline, task: Task) -> bool:
    return point.measured.damage <= max(_allowed(dense, task), 2 * point.measured.damage_error)


def _allowed(dense: Baseline, task: Task) -> float:
    return TOLERATED if task.lower_is_better else TOLERATED * abs(dense.score)


def _outcome(point: SweepPoint, dense: Baseline, task: Task) -> str:
    unit = "nats of log perplexity" if task.lower_is_better else "points"
    measured = point.measured
    if measured.damage == 0:
        return f"loses nothing on these {dense.samples} samples"
    verb = "loses" if measured.damage > 0 else "gains"
    unsure = _allowed(dense, task) < measured.damage <= 2 * measured.damage_error
    caution = f", as far as {dense.samples} samples can tell" if unsure else ""
    return f"{verb} {abs(measured.damage):.3g} ± {measured.damage_error:.2g} {unit}{caution}"
