"""The numbers behind the plots, and that they can be read: figures hold what was measured, texts fit their places."""

from __future__ import annotations

import base64
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib import _pylab_helpers, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import imread

from hf_lowrank import METHODS
from hf_lowrank.folder.grid import grid_of, log_norm
from hf_lowrank.folder.picture import ranks_figure
from hf_lowrank.folder.style import data_uri, method_style, png_bytes, save_png
from hf_lowrank.studies.analysis import (
    Baseline,
    Correlation,
    FisherShape,
    Group,
    GroupTruncation,
    LayerAnalysis,
    LayerMethod,
    Measurement,
    SweepPoint,
)
from hf_lowrank.studies.plots.predictor import correlation_figure, expectation_figure, fisher_figure
from hf_lowrank.studies.plots.rank_sweep import rank_sweep_figure
from hf_lowrank.studies.plots.redundancy import redundancy_figure
from hf_lowrank.studies.plots.truncation import truncation_figure

TYPES = ("attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense")


def names(blocks: int) -> list[str]:
    return [f"bert.encoder.layer.{block}.{kind}" for block in range(blocks) for kind in TYPES]


def measured(damage: float) -> Measurement:
    return Measurement(80 - damage, damage, 0.5, damage / 10, 0.01)


def layers(blocks: int = 6) -> list[LayerAnalysis]:
    shares = [1.0 + n for n in range(blocks * len(TYPES))]
    return [
        LayerAnalysis(
            name, 384, 1536, 127, 100, FisherShape(1 + share / 9, 1.0, share / 9, 0.5), 300.0, 200.0, share,
            share / sum(shares),
            {m: LayerMethod(share / k, share, 0.3, measured(share - 3)) for k, m in ((1, "svd"), (5, "kfac"))},
        )
        for name, share in zip(names(blocks), shares, strict=True)
    ]  # fmt: skip


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


# --- style ---


def test_every_method_has_its_own_look() -> None:
    looks = [tuple(method_style(name)[key] for key in ("color", "marker", "linestyle")) for name in METHODS]
    assert len(set(looks)) == len(METHODS)
    papers = ("svd", "fwsvd", "tfwsvd", "kfac")
    assert len({method_style(name)["color"] for name in papers}) == len(papers)
    assert method_style("not yet there")["color"] not in {look[0] for look in looks}


def test_plotting_leaves_no_global_state() -> None:
    before, figures = dict(rcParams), dict(_pylab_helpers.Gcf.figs)
    png_bytes(redundancy_figure(layers(), 0.33))
    assert dict(rcParams) == before
    assert dict(_pylab_helpers.Gcf.figs) == figures


def test_a_png_is_whole_and_the_same_every_time(tmp_path: Path) -> None:
    make = lambda: ranks_figure({"h.0.q": {"out": 8, "in": 8, "rank": 2}})  # noqa: E731
    save_png(make(), tmp_path / "ranks.png")
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.png"]
    assert (tmp_path / "ranks.png").read_bytes() == png_bytes(make())
    head, _, code = data_uri(make()).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(code) == png_bytes(make())
    assert imread(tmp_path / "ranks.png").ndim == 3


# --- heat maps ---


def test_names_become_blocks_and_types() -> None:
    grid = grid_of(["bert.encoder.layer.10.q", "bert.encoder.layer.2.q", "bert.encoder.layer.2.k", "bert.pooler.dense"])
    assert grid.blocks == ("2", "10", "–")
    assert grid.types == ("q", "k", "bert.pooler.dense")
    assert grid.cells["bert.pooler.dense"] == (2, 2)
    both = grid_of(["model.encoder.layers.0.fc", "model.decoder.layers.0.fc"])
    assert both.types == ("encoder: fc", "decoder: fc")
    assert len(set(both.cells.values())) == 2


def test_ranks_are_shown_with_their_share() -> None:
    ranks: dict[str, Any] = {
        "h.0.q": {"out": 384, "in": 384, "rank": 127},
        "h.0.up": {"out": 1536, "in": 384, "rank": 38},
        "h.1.q": {"out": 384, "in": 384, "rank": None},
    }
    assert sorted(texts(ranks_figure(ranks))) == ["127 · 33%", "38 · 10%", "dense"]
    with pytest.raises(ValueError, match="no layers"):
        ranks_figure({})


@pytest.mark.parametrize("blocks", [2, 6, 48])
def test_every_number_fits_its_cell(blocks: int) -> None:
    ranks = {name: {"out": 14336, "in": 4096, "rank": 2048} for name in names(blocks)}
    figure = ranks_figure(ranks)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    (left, bottom), (right, top) = axes.transData.transform([(0, 1), (1, 0)])
    assert len(axes.texts) == 5 * blocks
    for text in axes.texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.width < right - left
        assert box.height < top - bottom
    ticks = [label.get_window_extent(canvas.get_renderer()) for label in axes.get_yticklabels()]
    assert all(not a.overlaps(b) for a, b in pairwise(ticks))
    page = figure.get_window_extent()
    assert all(label.get_window_extent(canvas.get_renderer()).x0 >= page.x0 - 1 for label in axes.get_xticklabels())


def test_redundancy_shows_each_layers_share() -> None:
    found = layers(2)
    assert texts(redundancy_figure(found, 0.33)) == [f"{100 * layer.share:.2g}%" for layer in found]


def test_a_logarithmic_scale_ends_after_its_decades() -> None:
    norm = log_norm([1e-9, 1.0, 10.0], decades=3)
    assert isinstance(norm, LogNorm)
    assert (norm.vmin, norm.vmax) == (0.01, 10.0)
    assert float(norm(1e-9)) == 0
    assert not isinstance(log_norm([0.0, 0.0]), LogNorm)
    assert float(log_norm([2.0])(2.0)) == 1


# --- curves and bars ---


def truncation(method: str, damages: list[float]) -> GroupTruncation:
    groups = tuple(Group(n, measured(damage), 1 / n, 0.1) for n, damage in enumerate(damages, 1))
    return GroupTruncation(method, groups, 0.5, None, 0.8)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_bars_are_the_damages(count: int) -> None:
    damages = [9.0, 2.0, 5.0, -0.1]
    figure = truncation_figure([truncation(method, damages) for method in list(METHODS)[:count]], "points")
    panels = [axes for axes in figure.axes if axes.get_visible() and axes.patches]
    assert len(panels) == count
    for panel, method in zip(panels, METHODS, strict=False):
        assert [bar.get_height() for bar in panel.patches] == damages
        ideal = next(line for line in panel.lines if len(line.get_xdata()) == 4)
        assert list(ideal.get_ydata()) == sorted(damages, reverse=True)
        assert panel.get_title() == f"{method}\nmonotonicity 0.50\nin the first third 80%"


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_the_sweep_draws_scores_and_the_dense_line(lower_is_better: bool) -> None:
    points = [
        SweepPoint(m, ratio, 0.5, measured(10 * (1 - ratio) + k))
        for k, m in enumerate(("svd", "kfac"))
        for ratio in (0.5, 0.1, 0.33)
    ]
    figure = rank_sweep_figure(points, Baseline(80.0, 1.0, 0.5, 300), "pearson_spearman", lower_is_better)
    axes = figure.axes[0]
    curves = {line.get_color(): line for line in axes.lines if len(line.get_xdata()) == 3}
    assert list(curves[method_style("kfac")["color"]].get_xdata()) == [0.1, 0.33, 0.5]
    assert list(curves[method_style("svd")["color"]].get_ydata()) == pytest.approx([71.0, 73.3, 75.0])
    assert any(set(line.get_ydata()) == {80.0} for line in axes.lines)
    assert axes.get_yscale() == ("log" if lower_is_better else "linear")
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"svd", "kfac", "dense"}


def test_expectations_are_drawn_against_measurements() -> None:
    found = layers(2)
    axes = expectation_figure(found).axes[0]
    colour = method_style("svd")["color"]
    points = next(line for line in axes.lines if line.get_color() == colour and len(line.get_xdata()) == len(found))
    assert list(points.get_xdata()) == [layer.methods["svd"].expected_increase for layer in found]
    assert list(points.get_ydata()) == [layer.methods["svd"].measured.loss_increase for layer in found]
    low, high = axes.get_ylim()
    assert low < min(points.get_ydata()) < max(points.get_ydata()) < high


def test_fisher_is_drawn_by_its_parts() -> None:
    found = layers(3)
    left, right = fisher_figure(found).axes
    drawn = sorted(float(y) for line in left.lines if len(line.get_xdata()) == 3 for y in line.get_ydata())
    assert drawn == sorted(layer.fisher.within_rows for layer in found)
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(TYPES)


def test_correlations_without_a_value_are_left_out() -> None:
    known = [
        Correlation("variation of Fisher", "svd: loss increase", 0.42, 0.01, 36),
        Correlation("reconstruction error", "svd: loss increase", None, None, 36),
        Correlation("variation of Fisher", "rescue by kfac: loss increase", -0.5, 0.01, 36),
        Correlation("variation of Fisher", "svd: damage", 0.9, 0.01, 36),
    ]
    figure = correlation_figure(known)
    assert [[bar.get_width() for bar in axes.patches] for axes in figure.axes] == [[0.42], [-0.5]]
    assert texts(figure) == ["0.42", "-0.50"]


# --- nothing is cut off ---


def cut(figure: Figure) -> list[str]:
    """The titles, labels and legends that reach beyond the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in filter(Axes.get_visible, figure.axes):
        shown += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        shown += axes.get_legend().get_texts() if axes.get_legend() else []
    page = figure.get_window_extent()
    boxes = {text.get_text(): text.get_window_extent(canvas.get_renderer()) for text in shown if text.get_text()}
    return [
        text for text, box in boxes.items() if min(box.x0, box.y0) < -1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1
    ]


@pytest.mark.slow
@pytest.mark.parametrize("methods", [["svd"], ["svd", "kfac"], list(METHODS)])
def test_no_text_of_an_analysis_is_cut_off(methods: list[str]) -> None:
    points = [SweepPoint(m, ratio, 0.5, measured(10 * (1 - ratio))) for m in methods for ratio in (0.1, 0.33, 0.5, 0.7)]
    found = [
        replace(layer, methods={m: LayerMethod(0.1, 0.1, 0.3, measured(n - 3.0)) for m in methods})
        for n, layer in enumerate(layers(6))
    ]
    known = [Correlation("expected increase, Kronecker", f"{m}: loss increase", 0.4, 0.01, 36) for m in methods]
    figures = {
        "rank sweep": rank_sweep_figure(points, Baseline(80.0, 1.0, 0.5, 300), "pearson_spearman", False),
        "truncation": truncation_figure(
            [truncation(m, [9.0, 2.0, -0.1]) for m in methods], "points of pearson_spearman"
        ),
        "redundancy": redundancy_figure(layers(1)[:1], 0.33),
        "expectation": expectation_figure(found),
        "fisher": fisher_figure(found),
        "correlation": correlation_figure(known),
    }
    assert {name: texts for name, figure in figures.items() if (texts := cut(figure))} == {}
