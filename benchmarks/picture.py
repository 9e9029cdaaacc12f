"""The first table of `allocation.md` → the picture of the README: `python -m benchmarks.picture`."""

import re
from pathlib import Path

from matplotlib.figure import Figure

from hf_lowrank.folder.style import DENSE_STYLE, method_style, new_figure, save_png, styled

STUDY = Path(__file__).with_name("allocation.md")
PICTURE = STUDY.parent / "pictures" / "score_against_size.png"
DENSE_SIZE = 22.7  # million parameters
# Where each curve's name stands: beside which of its points, and how many points (1/72 inch) from there.
LABELS: dict[str, tuple[str, int, tuple[int, int], str]] = {
    "svd": ("SVD", 1, (8, -8), "left"),
    "fwsvd": ("FWSVD", 1, (-8, 4), "right"),
    "tfwsvd": ("TFWSVD", 2, (8, -10), "left"),
    "whiten": ("activation whitening", 2, (-6, 2), "right"),
    "kfac, the default": ("hf_lowrank's default", 2, (0, 8), "center"),
}


def curves(text: str) -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """The dense score, and for each method its (million parameters, score), largest first."""
    dense = float(re.findall(r"dense \*\*([\d.]+)\*\*", text)[0])
    table = text.split("## What each method keeps")[1].split("\n## ")[0].replace("*", "")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    sizes = [float(cell.rstrip("M")) for cell in next(row for row in rows if row[0].startswith("parameters"))[2:]]
    scores = {row[0]: list(map(float, row[2:])) for row in rows if row[0] in LABELS}
    return dense, {name: list(zip(sizes, scores[name], strict=True)) for name in LABELS}


@styled
def size_figure(dense: float, found: dict[str, list[tuple[float, float]]]) -> Figure:
    """Score against parameters, a curve for each method, named beside it."""
    figure = new_figure()
    axes = figure.subplots()
    axes.axhline(dense, **DENSE_STYLE)
    axes.annotate(f"dense, {DENSE_SIZE:.1f}M parameters", (20.4, dense), (0, 5), textcoords="offset points", ha="right")
    for name, points in found.items():
        style = method_style(name.split(",")[0])
        label, number, offset, side = LABELS[name]
        axes.plot(*zip(*points, strict=True), **style)
        look = {"color": style["color"], "weight": "bold", "ha": side}
        axes.annotate(label, points[number], offset, textcoords="offset points", **look)
    axes.set_xlabel("parameters of the whole model, millions (MiniLM-L6 on STS-B, no fine-tuning after)")
    axes.set_ylabel("score")
    axes.set_ylim(0, 95)
    return figure


if __name__ == "__main__":
    save_png(size_figure(*curves(STUDY.read_text(encoding="utf-8"))), PICTURE)
