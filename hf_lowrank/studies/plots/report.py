"""An analysis → a folder: plots as PNG, everything as JSON, and one HTML page with all of it, images included."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.style import data_uri, png_bytes, save_png
from hf_lowrank.jobs.files import write_json, write_text
from hf_lowrank.studies.analysis import Analysis
from hf_lowrank.studies.analysis.recommend import LAYER_RULE, MODEL_RULE
from hf_lowrank.studies.plots import tables
from hf_lowrank.studies.plots.predictor import correlation_figure, expectation_figure, fisher_figure
from hf_lowrank.studies.plots.rank_sweep import rank_sweep_figure
from hf_lowrank.studies.plots.redundancy import redundancy_figure
from hf_lowrank.studies.plots.tables import Row
from hf_lowrank.studies.plots.truncation import truncation_figure

JOURNAL, PAGE, RECORD = "measurements.jsonl", "report.html", "analysis.json"

CAPTIONS = {
    "rank_sweep": "The score as ranks are taken away, without fine-tuning: that of the model which `compress` makes by "
    "this method and rank ratio, with ranks spread over the layers by the method's own allocation. Whiskers are "
    "standard errors of the difference to the dense model.",
    "group_truncation": "Singular directions of every layer in groups, from those a method keeps first to those it "
    "drops first, each group removed alone. A method that knows what matters shows falling bars (Hsu et al., 2022, "
    "figures 1 and 6). TFWSVD has no singular directions of its own: shown are those of the two-sided closed form that "
    "it starts from, ordered by their element-wise weighted contribution.",
    "redundancy": "The least expected loss increase of each layer at the rank ratio, by the Kronecker-factored "
    "quadratic model of the loss. Light layers are redundant, dark ones carry information.",
    "expectation": "Points on the dashed line cost what the quadratic model of the loss expects. It holds for small "
    "changes; large ones cost more or less than that.",
    "fisher": "The variance of Fisher information within a matrix, our reconstruction of the metric of Hua et al. "
    "(2022). A row is an input feature. Variance between rows is what FWSVD can follow.",
    "correlation": "What each number is worth as a predictor, over the layers of this model. 'Rescue' is what plain "
    "SVD loses more than a weighted method.",
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figure { margin: 2rem 0; } figcaption { color: #555; font-size: 0.9rem; margin-top: 0.4rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } li { margin: 0.4rem 0; }
"""


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make the folder. One that holds measurements is gone on with, or with `overwrite` they are forgotten.

    Raises:
        LowRankError: it is a file, or holds other things and `overwrite` is off.
    """
    journal = folder / JOURNAL
    if folder.is_file():
        raise LowRankError(f"{folder} is a file; choose a folder")
    if overwrite:
        journal.unlink(missing_ok=True)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()) and not journal.is_file():
        raise LowRankError(
            f"{folder} exists and holds no analysis to go on with; choose another folder or pass --overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)


def save_analysis(analysis: Analysis, folder: Path) -> None:
    """Write `analysis.json`, a PNG for every plot, and `report.html`, each file whole or not at all, the page last."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {name: png_bytes(figure) for name, figure in figures(analysis).items()}
    write_json(folder / RECORD, analysis.to_dict())
    for name, image in images.items():
        save_png(image, folder / f"{name}.png")
    write_text(folder / PAGE, page(analysis, images))


def figures(analysis: Analysis) -> dict[str, Figure]:
    """Every plot of an analysis by file name."""
    return {
        "rank_sweep": rank_sweep_figure(analysis.sweep, analysis.dense, analysis.score_name, analysis.lower_is_better),
        "group_truncation": truncation_figure(analysis.truncation, analysis.damage_unit),
        "redundancy": redundancy_figure(analysis.layers, analysis.rank_ratio),
        "expectation": expectation_figure(analysis.layers),
        "fisher": fisher_figure(analysis.layers),
        "correlation": correlation_figure(analysis.correlations),
    }


def page(analysis: Analysis, images: dict[str, bytes]) -> str:
    """The report as one HTML page: findings first, then plots (the PNGs of `figures`), then tables."""
    dense = analysis.dense
    title = f"What low rank costs {analysis.model} on {analysis.task}"
    facts = (
        f"Dense {analysis.score_name} {dense.score:.2f} ± {dense.score_error:.2f} on {dense.samples} validation "
        f"samples; {len(analysis.layers)} layers; statistics of {analysis.statistics['samples']} training samples. "
        "± is one standard error. Nothing was fine-tuned after compression. Fewer ranks make a smaller model; damage "
        f"is what the score loses, in {analysis.damage_unit}."
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(facts)}</p>",
        "<h2>Findings</h2>",
        "<ul>" + "".join(f"<li>{escape(finding)}</li>" for finding in analysis.findings) + "</ul>",
        "<h2>Plots</h2>",
        *(_figure(name, image) for name, image in images.items()),
        "<h2>Tables</h2>",
        _table("Rank sweep", *tables.sweep_rows(analysis)),
        f"<p>{escape(MODEL_RULE)}</p>",
        _table(f"Group truncation, damage in {analysis.damage_unit}", *tables.group_rows(analysis)),
        _table(f"Layers at {analysis.rank_ratio:.0%} of the ranks", *tables.layer_rows(analysis)),
        f"<p>{escape(LAYER_RULE)}</p>",
        _table("Each layer compressed alone: loss increase, expected and measured", *tables.alone_rows(analysis)),
        _table("Predictors against outcomes, over layers", *tables.correlation_rows(analysis)),
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _figure(name: str, png: bytes) -> str:
    image = f'<img src="{data_uri(png)}" alt="{name.replace("_", " ")}">'
    return f"<figure>{image}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"


def _table(title: str, header: Row, rows: Iterable[Row]) -> str:
    def line(cells: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(_shown(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<h3>{escape(title)}</h3><div class="table"><table>{line(header, "th")}\n{body}</table></div>'


def _shown(cell: object) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
