"""Layers compressed alone → what was expected of each against what was measured, and how well each number predicts."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hf_lowrank.folder.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    legend_beside,
    method_style,
    new_figure,
    styled,
)
from hf_lowrank.model.layer_names import kind_of
from hf_lowrank.studies.analysis import Correlation, LayerAnalysis

TYPE_LOOKS = list(zip((BLUE, SKY, GREEN, PURPLE, VERMILLION, ORANGE, BLACK, GREY), "osD^vPXh", strict=True))
PANELS = 7  # side by side


@styled
def expectation_figure(layers: Sequence[LayerAnalysis]) -> Figure:
    """Measured against expected loss increase of every layer compressed alone, by each method.

    Both scales are logarithmic, the measured one linear near 0, where it may be negative.
    """
    figure = new_figure(7.0, 4.6)
    axes = figure.add_subplot()
    for method in layers[0].methods:
        of = [layer.methods[method] for layer in layers]
        look = {key: value for key, value in method_style(method).items() if key != "linestyle"}
        axes.errorbar(
            [point.expected_increase for point in of],
            [point.measured.loss_increase for point in of],
            [point.measured.loss_increase_error for point in of],
            linestyle="none",
            elinewidth=0.6,
            alpha=0.75,
            label=method,
            **look,
        )
    axes.set_xscale("log")
    _symlog(axes, [point.measured.loss_increase for layer in layers for point in layer.methods.values()])
    axes.axhline(0, color=BLACK, linewidth=0.6)
    _draw_identity(axes, [point.expected_increase for layer in layers for point in layer.methods.values()])
    axes.set_xlabel("expected loss increase, ½ E[tr ΔᵀGΔA] (loss per sample)")
    axes.set_ylabel("measured loss increase (loss per sample)")
    axes.set_title("One layer compressed, the others dense: each point is a layer")
    legend_beside(axes)
    return figure


@styled
def fisher_figure(layers: Sequence[LayerAnalysis]) -> Figure:
    """How unevenly Fisher information is spread, by its two parts, and the loss by plain SVD it should predict."""
    method = "svd" if "svd" in layers[0].methods else next(iter(layers[0].methods))
    figure = new_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(kind_of(layer.name) for layer in layers))
    for n, kind in enumerate(kinds):
        chosen = [layer for layer in layers if kind_of(layer.name) == kind]
        colour, marker = TYPE_LOOKS[n % len(TYPE_LOOKS)]
        look = {"color": colour, "marker": marker, "linestyle": "none", "label": kind, "markersize": 5.5}
        left.plot([x.fisher.between_rows for x in chosen], [x.fisher.within_rows for x in chosen], **look)
        measured = [x.methods[method].measured.loss_increase for x in chosen]
        right.plot([x.fisher.variation for x in chosen], measured, **look)
    left.axline((1, 1), slope=1, color=GREY, linewidth=0.8, linestyle="--")
    left.set_title("Where Fisher varies: above the line, within rows")
    left.set_xlabel("between rows (what FWSVD can follow)")
    left.set_ylabel("within rows (only single elements can)")
    right.set_title("Does its variation predict the loss?")
    for axes, which in ((left, "x"), (left, "y"), (right, "x")):
        _log_scale(axes, which)
    right.set_xlabel("coefficient of variation of Fisher")
    right.set_ylabel(f"measured loss increase by {method} (per sample)")
    _symlog(right, [layer.methods[method].measured.loss_increase for layer in layers])
    legend_beside(right, title="layer type (row: input feature)")
    return figure


@styled
def correlation_figure(correlations: Sequence[Correlation], ending: str = "loss increase") -> Figure:
    """Spearman's ρ of every predictor (rows) with every outcome (columns) whose name ends so, as a table with bars."""
    known = [found for found in correlations if found.outcome.endswith(ending)]
    outcomes = list(dict.fromkeys(found.outcome for found in known))
    predictors = list(dict.fromkeys(found.predictor for found in known))
    columns = min(PANELS, len(outcomes))
    rows = -(-len(outcomes) // columns)
    figure = new_figure(2.6 + 1.25 * columns, rows * (0.9 + 0.3 * len(predictors)) + 0.45)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for n, panel in enumerate(panels):
        if n >= len(outcomes):
            panel.set_visible(False)
            continue
        rho = {found.predictor: found.rho for found in known if found.outcome == outcomes[n] and found.rho is not None}
        _bars(panel, {predictors.index(name): value for name, value in rho.items()}, outcomes[n])
        panel.set_yticks(range(len(predictors)), predictors)
        panel.set_ylim(len(predictors) - 0.5, -0.5)
    figure.supxlabel("Spearman's ρ over layers:\n1 means that the predictor orders them rightly", fontsize=8.5)
    return figure


def _bars(axes: Axes, rho: dict[int, float], outcome: str) -> None:
    """A bar for each row, with its number at the right."""
    axes.barh(list(rho), list(rho.values()), 0.7, color=method_style(_method_of(outcome))["color"])
    for row, value in rho.items():
        axes.text(1.5, row, f"{value:.2f}", ha="right", va="center", fontsize=7)
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set_xlim(-1, 1.55)
    axes.set_xticks([-1, 0, 1])
    axes.set_title(outcome.replace(": ", "\n"), fontsize=8)
    axes.tick_params(axis="y", length=0)


def _draw_identity(axes: Axes, expected: Sequence[float]) -> None:
    """Where what is expected is measured; a curve where the scales differ."""
    positive = [value for value in expected if value > 0]
    if positive:
        ends = np.geomspace(min(positive), max(positive), 100)
        axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.0, label="as expected", scaley=False)


def _method_of(outcome: str) -> str:
    return outcome.split(":")[0].removeprefix("rescue by ")


def _log_scale(axes: Axes, which: str) -> None:
    """A logarithmic x or y axis with plain numbers that do not run into each other."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _symlog(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis, linear around 0 for the smallest quarter of the magnitudes, cut to the values."""
    magnitudes = sorted(abs(value) for value in values if value)
    threshold = magnitudes[len(magnitudes) // 4] if magnitudes else 1.0
    axes.set_yscale("symlog", linthresh=threshold)
    axes.set_ylim(min(1.5 * min(values), -0.3 * threshold), max(1.5 * max(values), threshold))
