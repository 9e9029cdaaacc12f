"""A rank sweep → score against the share of the ranks kept, one line for each method, the dense score as a line."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from hf_lowrank.folder.style import DENSE_STYLE, legend_beside, method_style, new_figure, styled
from hf_lowrank.studies.analysis import Baseline, SweepPoint


@styled
def rank_sweep_figure(points: Sequence[SweepPoint], dense: Baseline, score_name: str, lower_is_better: bool) -> Figure:
    """Score by rank ratio with standard errors; perplexities, which span magnitudes, on a logarithmic scale.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("there is no rank sweep to draw")
    figure = new_figure()
    axes = figure.add_subplot()
    for method in dict.fromkeys(point.method for point in points):
        mine = sorted((point for point in points if point.method == method), key=lambda point: point.rank_ratio)
        scores = [point.measured.score for point in mine]
        errors = [point.measured.damage_error * (point.measured.score if lower_is_better else 1) for point in mine]
        look = method_style(method)
        axes.errorbar([point.rank_ratio for point in mine], scores, errors, label=method, elinewidth=0.9, **look)
    axes.axhline(dense.score, label="dense", **DENSE_STYLE)
    ratios = sorted({point.rank_ratio for point in points})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("rank ratio: share of the ranks kept, spread over the layers as compress does by default")
    axes.set_ylabel(f"{score_name.replace('_', '–')}" + (" (less is better)" if lower_is_better else " (%)"))
    if lower_is_better:
        axes.set_yscale("log")
    axes.set_title(f"Score without fine-tuning, {dense.samples} validation samples")
    legend_beside(axes)
    return figure
