"""Rows that `benchmarks lm` writes → KL to dense against parameters kept: `python -m benchmarks.lm_picture ROWS`."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lm import SHARES
from hf_lowrank.folder.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILLION, new_figure, save_png, styled

PICTURE = Path(__file__).parent / "pictures" / "language_model.png"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "modegpt": ("MoDeGPT", {"color": GREEN, "marker": "D"}),
    "narrow": ("narrower MLPs", {"color": ORANGE, "marker": "v"}),
    "svd": ("SVD", {"color": BLACK, "marker": "x"}),
    "whiten": ("whitening (SVD-LLM)", {"color": VERMILLION, "marker": "^"}),
    "whiten-greedy": ("whitening, ranks by expected loss", {"color": PURPLE, "marker": "s"}),
    "kfac": ("the default", {"color": BLUE, "marker": "o"}),
}


def points(rows: Iterable[dict[str, Any]], way: str) -> list[tuple[float, float]]:
    """(percent of the parameters kept, KL in nats) of a way, means over seeds, in falling order."""
    found = defaultdict(list)
    for row in rows:
        if row["of"][0] == way:
            found[row["of"][1]].append(row["divergence"])
    return [(100 * share, fmean(nats)) for share, nats in sorted(found.items(), reverse=True)]


@styled
def language_model_figure(rows: list[dict[str, Any]]) -> Figure:
    """A line for each of `WAYS`, on a logarithmic scale."""
    figure = new_figure(width=6.0, height=3.6)
    axes = figure.subplots()
    for way, (label, look) in WAYS.items():
        if found := points(rows, way):
            axes.plot(*zip(*found, strict=True), **look, label=label)
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xticks([100 * share for share in SHARES])
    axes.set_xlabel("percent of the blocks' parameters kept")
    axes.set_ylabel("KL to dense, nats")
    axes.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    save_png(language_model_figure([json.loads(line) for line in lines]), PICTURE)
