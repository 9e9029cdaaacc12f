"""Rows that `benchmarks bytes` writes → score against bytes and time: `python -m benchmarks.bytes_picture ROWS`."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lowrank.folder.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILLION, new_figure, save_png, styled

PICTURE = Path(__file__).parent / "pictures" / "score_against_bytes.png"
GRAPHS = "float32, ONNX Runtime", "int8, ONNX Runtime"
BITS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {"color": BLACK, "marker": "o"}),
    "int8": ("int8", {"color": BLUE, "marker": "s"}),
    "int4": ("int4", {"color": VERMILLION, "marker": "^"}),
    "chosen by layer": ("--bytes", {"color": PURPLE, "marker": "*", "markersize": 8}),
    GRAPHS[0]: ("float32", {"color": BLACK, "marker": "o"}),
    GRAPHS[1]: ("int8", {"color": GREEN, "marker": "D"}),
}
SMALLER = "half the blocks"  # not factorized: fewer of the family's blocks
MARGIN = 2.0  # points of score above and below, so that noise does not look large
BY_BYTES = ("float32", "int8", "int4", "chosen by layer")

Point = tuple[float, float]


def points(rows: Iterable[dict[str, Any]], bits: str, across: str) -> tuple[list[Point], list[Point]]:
    """(`across`, score) of the dense model and of compressed ones, means over seeds, in falling order of `across`."""
    found: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        if row["bits"] == bits and row.get(across):
            value = row[across]
            found[row["model"]].append((median(value) if isinstance(value, list) else value, row["score"]))
    found.pop(SMALLER, None)
    means = {model: (fmean(x for x, _ in of), fmean(y for _, y in of)) for model, of in found.items()}
    dense = [means.pop("dense")] if "dense" in means else []
    return dense, sorted(means.values(), reverse=True)


@styled
def bytes_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Score against megabytes, and against how many times as fast as dense float32; the dense model's marks hollow."""
    timed = any(row.get("speed") for row in rows)
    figure = new_figure(width=9.0 if timed else 6.0, height=3.6)
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    _panel(panels[0], rows, BY_BYTES, "megabytes")
    panels[0].set_xscale("log")
    panels[0].set_xticks([5, 10, 20, 40, 80], ["5", "10", "20", "40", "80"])
    panels[0].minorticks_off()
    panels[0].set_xlabel("megabytes of the whole model (hollow: not factorized)")
    panels[0].set_ylabel("score")
    small = sorted((row["megabytes"], row["score"]) for row in rows if row["model"] == SMALLER)
    if small:
        panels[0].plot(*zip(*small, strict=True), "x--", color=ORANGE, label="half the blocks, distilled")
        panels[0].legend(loc="best")
    scores = [row["score"] for row in rows]
    panels[0].set_ylim(min(scores) - MARGIN, max(scores) + MARGIN)
    if timed:
        _panel(panels[1], rows, GRAPHS, "speed")
        panels[1].set_xlabel("times as fast as dense float32 (ONNX Runtime, one CPU thread)")
    return figure


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], bits: Sequence[str], across: str) -> None:
    for name in bits:
        label, look = BITS[name]
        dense, compressed = points(rows, name, across)
        if dense:
            axes.plot(*zip(*dense, strict=True), **look, linestyle="none", markerfacecolor="none")
        if compressed:
            axes.plot(*zip(*compressed, strict=True), **look, label=f"low rank, {label}")
    axes.legend(loc="lower right" if across == "megabytes" else "lower left")


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    save_png(bytes_figure([json.loads(line) for line in lines]), PICTURE)
