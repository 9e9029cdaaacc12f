"""The tasks by name."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.custom import custom_task
from hf_lowrank.tasks.metrics import accuracy, correlation, entities, f1, matthews
from hf_lowrank.tasks.task import Task


def _glue(name: str, text: tuple[str, ...], score: str, metrics: Callable, names: tuple[str, ...], **rest: Any) -> Task:
    kind = "classification" if names else "regression"
    return Task(name, kind, text, "label", ("nyu-mll/glue", name), score, metrics, names, **rest)


_ENTAILMENT = ("entailment", "not_entailment")
_CONLL = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")

TASKS = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), "matthews", matthews, ("unacceptable", "acceptable")),
        _glue("sst2", ("sentence",), "accuracy", accuracy, ("negative", "positive")),
        _glue("mrpc", ("sentence1", "sentence2"), "f1", f1, ("not_equivalent", "equivalent")),
        _glue("stsb", ("sentence1", "sentence2"), "pearson_spearman", correlation, ()),
        _glue("qqp", ("question1", "question2"), "f1", f1, ("not_duplicate", "duplicate")),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            "accuracy",
            accuracy,
            ("entailment", "neutral", "contradiction"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        _glue("qnli", ("question", "sentence"), "accuracy", accuracy, _ENTAILMENT),
        _glue("rte", ("sentence1", "sentence2"), "accuracy", accuracy, _ENTAILMENT),
        Task(
            "conll2003",
            "token_classification",
            ("tokens",),
            "ner_tags",
            ("lhoestq/conll2003", None),
            "entity_f1",
            entities,
            _CONLL,
        ),
        Task(
            "tinystories", "causal_lm", ("text",), None, ("roneneldan/TinyStories", None), "perplexity", max_length=512
        ),
        Task(
            "wikitext2",
            "causal_lm",
            ("text",),
            None,
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
            "perplexity",
            packed=True,
            max_length=1024,
        ),
        Task("text", "causal_lm", ("text",), None, ("", None), "perplexity", packed=True, max_length=1024),
    )
}


NAMES = (*TASKS, "custom")


def get_task(
    name: str,
    max_length: int | None = None,
    *,
    data_dir: Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> Task:
    """The task called `name`, cut at another length or reading other columns if given.

    "custom" is a classification, or regression where the labels are fractions, of the files in `data_dir`; the names of
    its columns must be given.

    Raises:
        LowRankError: there is no such task, the message lists the names; or columns that it cannot have.
    """
    if name == "custom":
        task = custom_task(data_dir, tuple(text_columns or ()), label_column)
    elif name in TASKS:
        task = _with_columns(TASKS[name], tuple(text_columns or ()), label_column)
    else:
        raise LowRankError(f"unknown task {name!r}; the tasks are {', '.join(NAMES)}")
    return replace(task, max_length=max_length) if max_length else task


def _with_columns(task: Task, text: tuple[str, ...], label: str | None) -> Task:
    if text and len(text) != len(task.text):
        raise LowRankError(f"{task.name} reads {len(task.text)} text columns ({', '.join(task.text)}), not {len(text)}")
    if label is not None and task.label is None:
        raise LowRankError(f"{task.name} has no labels, so no label column")
    return replace(task, text=text or task.text, label=label or task.label)
