"""The records of a sweep → a table in Markdown, with the best models marked, and plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from hf_lowrank.folder.style import save_png
from hf_lowrank.jobs.files import write_text
from hf_lowrank.studies.plots.sweep import loss_figure, pareto_figure
from hf_lowrank.tasks import Task
from hf_lowrank.training.divergence import KL

Record = dict[str, Any]

_LEGEND = (
    "`*`: no smaller or equal model scores higher. time: of a batch, relative to the first model's. loss +: measured "
    "increase of the mean loss on the calibration samples; expected +: what the method's objective expects.\n"
)


def write_summary(records: Sequence[Record], task: Task, folder: Path) -> str:
    """Write `summary.md` and the plots of a sweep into its folder; the table, in Markdown."""
    made = [record for record in records if "impossible" not in record]
    finetuned = any("score_finetuned" in record for record in made)
    table = summary_table(records, task, finetuned)
    write_text(folder / "summary.md", table + "\n")
    save_png(pareto_figure(made, task.score), folder / "pareto.png")
    save_png(loss_figure(made), folder / "loss.png")
    if finetuned:
        save_png(pareto_figure(made, task.score, finetuned=True), folder / "pareto-finetuned.png")
    return table


def summary_table(records: Sequence[Record], task: Task, finetuned: bool) -> str:
    """One row for each model; those that no smaller model equals are marked *, and losses are correlated below."""
    columns = ["method", "ranks", "budget", "parameters", "targeted", "time", task.score, _measure(records)]
    columns += ["loss +", "expected +"]
    columns += ["fine-tuned"] if finetuned else []
    lines = [columns, ["---"] * len(columns)]
    dense, best = records[0], _pareto(records, task)
    for record in records:
        cells = [
            record["method"],
            record.get("allocation", ""),
            f"{record.get('budget', '')} {record.get('value', '')}",
        ]
        if "impossible" in record:
            lines.append([*cells, record["impossible"], *[""] * (len(columns) - 4)])
            continue
        mark = " *" if record in best else ""
        expected = record.get("expected_loss")
        cells += [f"{record['parameters'] / 1e6:.2f}M", f"{record.get('targeted', 1):.1%}"]
        cells += [f"{record['relative_latency']:.2f}", f"{record['score']:.2f}{mark}"]
        cells += [_divergence(record)]
        cells += [f"{record['calibration_loss'] - dense['calibration_loss']:.4f}"]
        cells += ["" if expected is None else f"{expected:.4f}"]
        cells += [f"{record['score_finetuned']:.2f}" if "score_finetuned" in record else ""] if finetuned else []
        lines.append(cells)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{_LEGEND}\n{_correlations(records)}"


def _measure(records: Sequence[Record]) -> str:
    """What the divergence from the first model is called."""
    return next((record["divergence"]["measure"] for record in records if "divergence" in record), KL)


def _divergence(record: Record) -> str:
    found = record.get("divergence")
    return f"{found['mean']:.4g} ± {found['standard_error']:.2g}" if found else ""


def _pareto(records: Sequence[Record], task: Task) -> list[Record]:
    sign = -1 if task.lower_is_better else 1
    made = [record for record in records if "impossible" not in record]

    def beaten(record: Record, by: Record) -> bool:
        smaller, better = by["parameters"] <= record["parameters"], sign * by["score"] > sign * record["score"]
        return smaller and better

    return [record for record in made if not any(beaten(record, other) for other in made)]


def _correlations(records: Sequence[Record]) -> str:
    """Spearman's correlation of expected and measured increase over the budgets of each method and allocation."""
    dense, groups = records[0], dict[tuple[str, str], list[tuple[float, float]]]()
    for record in records[1:]:
        if record.get("expected_loss") is not None:
            measured = record["calibration_loss"] - dense["calibration_loss"]
            groups.setdefault((record["method"], record["allocation"]), []).append((record["expected_loss"], measured))
    lines = []
    for (method, allocation), pairs in groups.items():
        if len(pairs) >= 3:
            correlation = spearmanr(*zip(*pairs, strict=True)).statistic
            lines.append(f"{method}, {allocation}: {correlation:.2f}")
    return "Rank correlation of expected and measured loss over budgets: " + "; ".join(lines) if lines else ""
