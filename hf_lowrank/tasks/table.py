"""The tasks by name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.metrics import (
    accuracy,
    chrf,
    correlation,
    entities,
    f1,
    labels_f1,
    macro_f1,
    matthews,
    rouge,
    squad,
)
from hf_lowrank.tasks.task import Task


def _glue(name: str, text: tuple[str, ...], score: str, metrics: Callable, names: tuple[str, ...], **rest: Any) -> Task:
    kind = "classification" if names else "regression"
    return Task(name, kind, text, "label", ("nyu-mll/glue", name), score, metrics, names, **rest)


def _own(name: str, kind: str, text: tuple[str, ...], label: str | None, score: str, **rest: Any) -> Task:
    return Task(name, kind, text, label, ("", None), score, own_data=True, **rest)


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
            validation=("test",),
            packed=True,
            separator="\n\n",
            max_length=2048,
        ),
        Task("text", "causal_lm", ("text",), None, ("", None), "perplexity", packed=True, max_length=2048),
        Task("chat", "causal_lm", ("messages",), None, ("", None), "perplexity", chat=True, max_length=2048),
        _own("fill-mask", "masked_lm", ("text",), None, "perplexity", max_length=512),
        _own(
            "question-answering",
            "question_answering",
            ("question", "context"),
            "answers",
            "squad_f1",
            metrics=squad,
            max_length=384,
        ),
        _own("multi-label", "multi_label", ("text",), "labels", "micro_f1", metrics=labels_f1, max_length=256),
        _own("summarization", "seq2seq", ("document",), "summary", "rougeL", metrics=rouge, max_length=512),
        _own("translation", "seq2seq", ("source",), "target", "chrf", metrics=chrf),
        _own("image-classification", "image_classification", ("image",), "label", "accuracy", metrics=macro_f1),
    )
}


NAMES = (*TASKS, "custom")

# The least that statistics are measured on, unless it is said: training rows, and texts or windows of a language model.
SAMPLES = 1024
WINDOWS = 128


def task_name(name: str) -> str:
    """The name of a task in whatever case and spelling: "STS-B", "sts_b" and "stsb" are one.

    Raises:
        LowRankError: there is no such task; the message lists the names, and the nearest.
    """
    names = (*TASKS, "custom")  # with those that somebody has added
    spelled = {_letters(known): known for known in names}
    if found := spelled.get(_letters(name)):
        return found
    near = get_close_matches(_letters(name), spelled, 1)
    meant = f"; did you mean {spelled[near[0]]!r}?" if near else ""
    raise LowRankError(
        f"unknown task {name!r}; the tasks are {', '.join(names)}{meant}; anything else, such as sound, takes "
        "compute_statistics() on batches of your own"
    )


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def get_task(
    name: str,
    max_length: int | None = None,
    *,
    data_dir: Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
) -> Task:
    """The task called `name` (`task_name`), cut at another length or reading other data or columns if given.

    "custom" is a classification, or regression where the labels are fractions, of the files in `data_dir`; the names of
    its columns must be given. Of a task with data of your own columns are found (see `settled`), unless given.

    Args:
        name: in whatever case.
        max_length: the tokens that texts are cut at.
        data_dir: a folder with the files of your own data.
        text_columns: the names of the columns that are read.
        label_column: the name of the column of the labels.
        dataset: in place of a folder a data set on the Hub, with a config after a colon if it has several.
        split: the one of its splits that is measured and trained on; None for "train".

    Raises:
        LowRankError: there is no such task, the message lists the names; columns that it cannot have; a length below 1.
    """
    name = task_name(name)
    if data_dir is not None and dataset is not None:
        raise LowRankError("give a folder of data or a data set on the Hub, not both")
    if split is not None and dataset is None:
        raise LowRankError("split is one of a dataset on the Hub, and none is given")
    if max_length is not None and max_length < 1:
        raise LowRankError(f"a text is cut at 1 token at least, not at max_length {max_length}")
    if data_dir is not None:
        from hf_lowrank.tasks.data import refuse_no_folder  # here: data sets take time to import

        refuse_no_folder(data_dir)
    if name == "custom":
        from hf_lowrank.tasks.custom import custom_task  # here: data sets take time to import

        task = custom_task(data_dir, tuple(text_columns or ()), label_column)
    elif TASKS[name].own_data:
        if data_dir is None and dataset is None:
            raise LowRankError(f"{name} has no data of its own; give a folder as data_dir, or a data set on the Hub")
        from hf_lowrank.tasks.columns import settled  # here: data sets take time to import

        task = settled(_on(TASKS[name], dataset, split), data_dir, tuple(text_columns or ()), label_column)
    else:
        task = _with_columns(_on(TASKS[name], dataset, split), tuple(text_columns or ()), label_column)
    return replace(task, max_length=max_length, length_asked=True) if max_length else task


def _on(task: Task, dataset: str | None, split: str | None) -> Task:
    """The task on another data set of the Hub, if one is given."""
    if dataset is None:
        return task
    if task.hub[0]:
        raise LowRankError(
            f"{task.name} is the data set {task.hub[0]}; another one needs one of the tasks for own data"
        )
    from hf_lowrank.tasks.data import on_hub  # here: data sets take time to import

    return on_hub(task, dataset, split or task.training)


def _with_columns(task: Task, text: tuple[str, ...], label: str | None) -> Task:
    if text and len(text) != len(task.text):
        raise LowRankError(f"{task.name} reads {len(task.text)} text columns ({', '.join(task.text)}), not {len(text)}")
    if label is not None and task.label is None:
        raise LowRankError(f"{task.name} has no labels, so no label column")
    return replace(task, text=text or task.text, label=label or task.label)
