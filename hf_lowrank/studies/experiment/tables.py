"""The records of a recipe → the papers' tables in Markdown, with means and deviations over seeds, and plain rows."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_lowrank.jobs.files import write_json, write_text
from hf_lowrank.studies.experiment.plan import Dense, budget_title, denses, runs_of
from hf_lowrank.studies.experiment.published import PUBLISHED
from hf_lowrank.studies.experiment.recipe import Experiment, Recipe
from hf_lowrank.studies.experiment.store import Record, Store
from hf_lowrank.tasks import TASKS

TITLES = {
    1: "Table 1: compact models fine-tuned (path 1), and models factorized (path 2)",
    2: "Table 2: compact models compressed further (path 3)",
    3: "Table 3: models that share parameters, compressed",
}
NOTHING = "–"


@dataclass
class Row:
    """One line: a model, what was done to it, and its scores by task and seed."""

    table: int
    path: int
    model: str
    method: str
    budget: str
    finetuned: bool
    parameters: list[int] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # of every task, by seed
    degenerate: list[str] = field(default_factory=list)
    divergences: dict[str, dict[str, float]] = field(default_factory=dict)  # from dense, likewise

    def add(self, dense: Dense, record: Record | None) -> None:
        """Take the score of a record, if there is one already."""
        task = dense.task.title
        self.scores.setdefault(task, {})
        if record is not None:
            self.scores[task][str(dense.seed)] = record["score"]
            self.parameters.append(record["parameters"])
            if "divergence" in record:
                self.divergences.setdefault(task, {})[str(dense.seed)] = record["divergence"]["mean"]
            if record["metrics"].get("degenerate"):
                self.degenerate.append(task)

    @property
    def means(self) -> dict[str, float | None]:
        """The mean over seeds of every task, None where nothing is known."""
        return {task: statistics.fmean(by_seed.values()) if by_seed else None for task, by_seed in self.scores.items()}


def rows_of(recipe: Recipe, store: Store) -> list[Row]:
    """All lines of all tables, in the order of the recipe, a line that two experiments share once."""
    rows: dict[tuple[Any, ...], Row] = {}
    for experiment in recipe.experiments:
        for row, dense, record in _records(experiment, store):
            key = row.table, row.model, row.method, row.budget, row.finetuned
            rows.setdefault(key, row).add(dense, record)
    return list(rows.values())


def tables_of(recipe: Recipe, store: Store) -> str:
    """The tables in Markdown."""
    rows = rows_of(recipe, store)
    parts = [f"# {recipe.title}"]
    for number, title in TITLES.items():
        if chosen := [row for row in rows if row.table == number]:
            parts.append(f"## {title}\n\n{_table(chosen)}\n\n{_notes(recipe, chosen)}")
    return "\n\n".join(parts) + "\n"


def write_tables(recipe: Recipe, store: Store, folder: Path) -> None:
    """Write `<recipe>.md`, and `<recipe>.json` with the same figures for machines."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{recipe.name}.md", tables_of(recipe, store))
    write_json(folder / f"{recipe.name}.json", [{**asdict(row), "means": row.means} for row in rows_of(recipe, store)])


def _records(experiment: Experiment, store: Store) -> Iterator[tuple[Row, Dense, Record | None]]:
    """Every line that an experiment speaks of, with one of its records, the dense models first."""
    for dense in denses(experiment):
        row = Row(experiment.table, experiment.path, dense.model.title, "dense", NOTHING, False)
        yield row, dense, store.get(dense.name, dense.settings)
    for dense in denses(experiment):
        for run in runs_of(experiment, dense):
            start = experiment.table, experiment.path, dense.model.title, run.method, budget_title(run.budget)
            yield Row(*start, False), dense, store.get(run.name, run.settings)
            if run.finetune is not None:
                yield Row(*start, True), dense, store.get(run.finetuned_name, run.finetuned_settings)


def _table(rows: list[Row]) -> str:
    tasks = list(dict.fromkeys(task for row in rows for task in row.scores))
    averaged = len(tasks) > 1 and not any(task in TASKS and TASKS[task].lower_is_better for task in tasks)
    lines = [
        ["model", "method", "budget", "parameters", "fine-tuned after", *tasks, *(["average"] if averaged else [])]
    ]
    for row in rows:
        cells = [_cell(row, task) for task in tasks]
        average = [_average([row.means.get(task) for task in tasks])] if averaged else []
        after = NOTHING if row.method == "dense" else "yes" if row.finetuned else "no"
        lines.append([row.model, row.method, row.budget, _size(row.parameters), after, *cells, *average])
    if averaged:
        lines += _published(rows, tasks)
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row, task: str) -> str:
    scores = list(row.scores.get(task, {}).values())
    if not scores:
        return NOTHING
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    apart = row.divergences.get(task, {}).values()
    nats = f" ({statistics.fmean(apart):.3g})" if apart else ""
    return f"{statistics.fmean(scores):.1f}{spread}{nats}{' †' if task in row.degenerate else ''}"


def _average(means: list[float | None]) -> str:
    known = [mean for mean in means if mean is not None]
    return f"{statistics.fmean(known):.2f}" if len(known) == len(means) else NOTHING


def _size(parameters: list[int]) -> str:
    if not parameters:
        return NOTHING
    mean = statistics.fmean(parameters)
    return f"{mean / 1e6:.1f}M" if mean >= 1e6 else f"{mean / 1e3:.1f}k"


def _published(rows: list[Row], tasks: list[str]) -> list[list[str]]:
    """Lines of other papers about models of this table on just these tasks."""
    models = {row.model for row in rows}
    lines = []
    for known in PUBLISHED:
        if known.model not in models or set(tasks) != known.tasks:
            continue
        for after, average in (("no", known.compressed), ("yes", known.finetuned)):
            if average is not None:
                after = NOTHING if known.method == "dense" else after
                start = [known.model, f"{known.method}, *published: {known.source}*", NOTHING, f"{known.parameters}M"]
                lines.append([*start, after, *[NOTHING] * len(tasks), f"{average:.2f}"])
    return lines


def _notes(recipe: Recipe, rows: list[Row]) -> str:
    tasks = dict.fromkeys(task for row in rows for task in row.scores)
    metrics = ", ".join(f"{task} {TASKS[task].score.replace('_', '–')}" for task in tasks if task in TASKS)
    seeds = sorted({seed for row in rows for by_seed in row.scores.values() for seed in by_seed}, key=int)
    notes = [f"Scores on the validation data ({metrics})." if metrics else "Scores on the validation data."]
    if seeds:
        spread = ", means ± standard deviations" if len(seeds) > 1 else ""
        notes.append(f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}{spread}.")
    if any(row.divergences for row in rows):
        notes.append(
            "In brackets how far predictions are from the dense model's: the mean KL in nats, of numbers half the "
            "squared change."
        )
    if any(row.degenerate for row in rows):
        notes.append("† With at least one seed every prediction is the same.")
    return " ".join(notes)
