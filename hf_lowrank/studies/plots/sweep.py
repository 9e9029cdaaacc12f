"""The records of a sweep → score against size, and measured against expected loss."""

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure

from hf_lowrank.folder.style import DENSE_STYLE, legend_beside, method_style, new_figure, styled

Record = dict[str, Any]

REFERENCES = ("dense", "given")  # what the model as it is goes by; given was compressed before

# A method has its colour and marker, an allocation its line and filling.
LINES: dict[str, Any] = {
    "uniform": {"linestyle": "-"},
    "greedy": {"linestyle": "--", "markerfacecolor": "white", "markersize": 6},
    "knapsack": {"linestyle": ":", "markersize": 8},
    "type-wise": {"linestyle": "-."},
    "effective-rank": {"linestyle": (0, (1, 1)), "markerfacecolor": "white"},
}


@styled
def pareto_figure(records: list[Record], score: str, finetuned: bool = False) -> Figure:
    """Score against parameters, one curve for each method and allocation, the first model's score as a line.

    `finetuned` takes the scores after fine-tuning.
    """
    figure = new_figure()
    axes = figure.subplots()
    dense = next(record for record in records if record["method"] in REFERENCES)
    axes.axhline(dense["score"], label=dense["method"], **DENSE_STYLE)
    for (method, allocation), curve in _curves(records).items():
        points = sorted((r["parameters"], r["score_finetuned" if finetuned else "score"]) for r in curve)
        axes.plot(*zip(*points, strict=True), label=f"{method}, {allocation}", **_style(method, allocation))
    size = dense["parameters_dense"] if "parameters_dense" in dense else dense["parameters"]
    axes.set_xlabel(f"parameters of the whole model (dense: {size / 1e6:.1f}M)")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value / 1e6:.3g}M")
    axes.set_ylabel(score)
    axes.set_title("after fine-tuning" if finetuned else "without fine-tuning")
    legend_beside(axes)
    return figure


@styled
def loss_figure(records: list[Record]) -> Figure:
    """The increase of the loss measured on the calibration samples against the expected one, on logarithmic axes."""
    figure = new_figure()
    axes = figure.subplots()
    dense = next(record for record in records if record["method"] in REFERENCES)
    for (method, allocation), curve in _curves(records).items():
        points = [
            (r["expected_loss"], r["calibration_loss"] - dense["calibration_loss"]) for r in curve if r["expected_loss"]
        ]
        points = sorted((expected, measured) for expected, measured in points if measured > 0)
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{method}, {allocation}", **_style(method, allocation))
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], label="equal", **DENSE_STYLE)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("expected increase of the loss")
    axes.set_ylabel("measured increase of the loss")
    legend_beside(axes)
    return figure


def _style(method: str, allocation: str) -> dict[str, Any]:
    return method_style(method) | LINES.get(allocation, {})


def _curves(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    curves: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["method"] not in REFERENCES and "impossible" not in record:
            curves.setdefault((record["method"], record["allocation"]), []).append(record)
    return curves
