"""The record of a benchmark → latencies of both models, and the speed-up beside the ratio of arithmetic."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lowrank.folder.style import BLACK, BLUE, GREY, ORANGE, new_figure, styled
from hf_lowrank.studies.bench.record import milliseconds


@styled
def bench_figure(record: dict[str, Any]) -> Figure:
    """Median latency by case, to the 90th percentile, and the speed-up, on the left and right of one row per case.

    All bars begin at 0. Latencies span magnitudes over cases, so each is drawn relative to the dense model's; the
    milliseconds are written on the bars.

    Args:
        record: `BenchRecord.to_dict()`.

    Raises:
        ValueError: there are no cases.
    """
    cases = record["cases"]
    if not cases:
        raise ValueError("there are no cases to draw")
    figure = new_figure(8.4, 1.5 + 0.52 * len(cases))
    latency, speed = figure.subplots(1, 2, sharey=True)
    rows = range(len(cases))
    _draw_latencies(latency, cases)
    speed.barh(rows, [case["speedup"] for case in cases], height=0.5, color=BLUE, label="measured")
    speed.plot([case["arithmetic"] for case in cases], rows, "|", color=BLACK, markersize=14, label="arithmetic")
    speed.axvline(1, color=GREY, linewidth=1)
    longest = max(max(case["speedup"], case["arithmetic"]) for case in cases)
    for row, case in zip(rows, cases, strict=True):
        told = f"{case['speedup']:.2f}× · {case['realised']:.0%}"
        _write(speed, row, told, case["speedup"], case["speedup"], longest, "w")
    speed.set_xlabel("speed-up, and the share of the arithmetic ratio realised")
    speed.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.suptitle(record["setup"], fontsize=8)
    return figure


def _draw_latencies(axes: Axes, cases: Sequence[dict[str, Any]]) -> None:
    for which, colour, offset in (("dense", ORANGE, -0.18), ("compressed", BLUE, 0.18)):
        dense = [case["median_ms"]["dense"] for case in cases]
        medians = [case["median_ms"][which] / whole for case, whole in zip(cases, dense, strict=True)]
        above = [
            max(0.0, case["p90_ms"][which] - case["median_ms"][which]) / whole
            for case, whole in zip(cases, dense, strict=True)
        ]
        rows = [row + offset for row in range(len(cases))]
        errors = {"elinewidth": 1, "ecolor": BLACK}
        axes.barh(
            rows, medians, height=0.34, color=colour, label=which, xerr=[[0] * len(cases), above], error_kw=errors
        )
        for row, case, width, more in zip(rows, cases, medians, above, strict=True):
            told = f"{milliseconds(case['median_ms'][which])} ms"
            _write(axes, row, told, width, width + more, 1, "k" if which == "dense" else "w")
    axes.set_xlim(left=0)
    axes.set_xlabel("latency, dense = 1: median, line to the 90th percentile")
    axes.set_yticks(range(len(cases)), [f"{case['phase']} {case['batch']} × {case['length']}" for case in cases])
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _write(axes: Axes, row: float, told: str, width: float, end: float, longest: float, colour: str) -> None:
    """Words on a bar from 0 to `width`, or after `end` where the bar is short beside the longest."""
    fits = width > 0.35 * longest
    place, look = (0.02 * longest, colour) if fits else (end + 0.02 * longest, "k")
    axes.text(place, row, told, va="center", color=look, fontsize=7)
