"""hf-lowrank evaluate: a model's score on a task."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import BatchOption, DataOrTexts, JsonOption, ModelArgument
from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.table import NAMES


@dataclass(frozen=True)
class HarnessOptions:
    """Tasks of lm-evaluation-harness in place of those here."""

    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Tasks of EleutherAI's lm-evaluation-harness, such as arc_easy,piqa, or YAML files of such tasks, for "
            "a language model. Needs the extra lm-eval.",
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of each task of --lm-eval the first so many samples. Default: all.")
    ] = None

    def tasks(self) -> list[str]:
        """Their names, of which there may be none.

        Raises:
            LowRankError: as `harness_tasks`; a limit of none.
        """
        if self.lm_eval is None:
            if self.limit is not None:
                raise LowRankError("--limit is of the tasks of --lm-eval")
            return []
        from hf_lowrank.training.lm_evaluation import harness_tasks

        return harness_tasks(self.lm_eval)


@command("evaluate")
def evaluate_command(
    model: ModelArgument,
    data: DataOrTexts,
    harness: HarnessOptions,
    task: Annotated[str | None, typer.Option(help=f"The task, not needed with --texts: {', '.join(NAMES)}.")] = None,
    against: Annotated[
        str | None, typer.Option(help="The dense model it was made from: how far predictions are from its own.")
    ] = None,
    batch_size: BatchOption = 32,
    as_json: JsonOption = False,
) -> None:
    """Score a model, dense or compressed, on a task's whole validation data; or compare it with the dense one.

    Example: hf-lowrank evaluate ./bert-stsb-lowrank --task stsb --against ./bert-stsb
    """
    named = data.reading(task)
    tasks = harness.tasks()
    if tasks and named is None and data.texts is None and against is None:
        return _by_harness(model, tasks, harness.limit, batch_size, as_json)
    if named is None and (data.texts is None or against is None):
        raise LowRankError(
            "evaluate needs a --task to score on, or --texts and --against to compare with a dense model"
        )
    if tasks:
        raise LowRankError("--lm-eval has tasks of its own; leave out --task, --texts and --against")

    from accelerate import PartialState

    from hf_lowrank.pipeline import fitting

    chosen: Any = fitting(model, named or data.of_texts(against or model))  # type: ignore[arg-type]
    facts = _measured(model, chosen, data, against, batch_size)
    if PartialState().is_main_process:
        print_json(facts) if as_json else _show(facts, chosen.score)


def _by_harness(model: str, tasks: list[str], limit: int | None, batch_size: int, as_json: bool) -> None:
    """The figures of the harness, shown."""
    from hf_lowrank.folder.loading import load_model
    from hf_lowrank.tasks import get_task
    from hf_lowrank.training.lm_evaluation import lm_evaluate

    loaded, tokenizer = load_model(model, get_task("text"))
    found = lm_evaluate(loaded, tokenizer, tasks, batch_size, limit)
    facts = {"model": model, "parameters": loaded.num_parameters(), "limit": limit, "lm_eval": found}
    if as_json:
        return print_json(facts)
    table = Table("task", "metric", "value", box=None, title=f"{model} by lm-eval, {facts['parameters']:,} parameters")
    for task, figures in found.items():
        for metric, value in figures.items():
            table.add_row(task, metric, f"{value:.4g}")
    console.print(table)


def _measured(model: str, task: Any, data: DataOrTexts, against: str | None, batch_size: int) -> dict[str, Any]:
    """Everything that is known of the model by the task's validation data, as plain values."""
    from hf_lowrank.folder.loading import load_model, load_trained
    from hf_lowrank.folder.sentences import read_sentences
    from hf_lowrank.tasks import described, label_mapping, load_validation
    from hf_lowrank.training.divergence import Reference
    from hf_lowrank.training.evaluate import evaluate_splits
    from hf_lowrank.training.similarity import agreement, evaluate_pairs

    loaded, tokenizer = load_model(model, task)
    validation = load_validation(task, data.data_dir, tokenizer, loaded.config)
    facts = {"model": model, "task": task.name, "parameters": loaded.num_parameters()}
    facts |= {"scored_on": described(validation, task, data.data_dir), "labels": label_mapping(task, loaded.config)}
    sentences = read_sentences(model)
    readout = None if sentences is None else sentences.readout
    if task.has_labels:
        facts |= evaluate_splits(loaded, tokenizer, task, validation, batch_size)
    elif task.is_scored and readout is not None:
        facts |= evaluate_pairs(loaded, tokenizer, task, readout, data.data_dir, batch_size)
    if against is not None:
        dense = load_trained(against, task)
        if task.is_scored and readout is not None:
            facts["neighbours shared with dense"] = agreement(dense, loaded, tokenizer, task, readout, data.data_dir)
        reference = Reference(dense, tokenizer, task, validation, batch_size, readout)
        facts |= {"against": against, "divergence": reference.divergence(loaded).to_dict()}
    return facts


def _show(facts: dict[str, Any], score: str) -> None:
    """The figures as a table; of the metrics the one that counts is marked."""
    title = f"{facts['model']} on {facts['task']}, {facts['parameters']:,} parameters"
    table = Table("metric", "value", box=None, title=title)
    for key, value in facts.items():
        if isinstance(value, float) and key not in ("score", "degenerate"):
            table.add_row(key, f"{value:.2f} (score)" if key == score else f"{value:.4g}")
    if found := facts.get("divergence"):
        table.add_row(found["measure"], f"{found['mean']:.4g} ± {found['standard_error']:.2g}")
        if "cosine" in found:
            table.add_row("cosine with dense", f"{found['cosine']:.4f}")
    console.print(table)
    if facts.get("degenerate"):
        console.print("warning: every prediction is the same; the model has collapsed")
