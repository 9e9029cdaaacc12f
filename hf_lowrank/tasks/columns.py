"""The data of a user and a task of no fixed columns → the task with the columns, and names of labels, found there.

A column is found by its type and its name, or because it is the only one of its type; which it is is told on stderr.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, Value

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import say_once
from hf_lowrank.tasks.data import data_name, has_split, load_rows
from hf_lowrank.tasks.sequences import with_library
from hf_lowrank.tasks.task import Task

MOST_LABELS = 1_000


@dataclass(frozen=True)
class Role:
    """What a column is for: how it is called, the names that it usually has, and the type that it must have."""

    name: str
    names: tuple[str, ...]
    fits: Callable[[Any], bool]


def _is_text(feature: Any) -> bool:
    return feature in (Value("string"), Value("large_string"))


def _is_class(feature: Any) -> bool:
    return (
        isinstance(feature, ClassLabel) or _is_text(feature) or (isinstance(feature, Value) and "int" in feature.dtype)
    )


def _inner(feature: Any) -> Any:
    """What a list is of, None if it is no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _is_classes(feature: Any) -> bool:
    return _is_class(_inner(feature))


def _is_answers(feature: Any) -> bool:
    parts = feature if isinstance(feature, dict) else _inner(feature)
    return isinstance(parts, dict) and {"text", "answer_start"} <= set(parts)


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image)


# kind → what its inputs are, and its labels
INPUTS = {
    "masked_lm": (Role("text", ("text", "sentence", "content", "document"), _is_text),),
    "question_answering": (
        Role("question", ("question", "query"), _is_text),
        Role("context", ("context", "passage", "paragraph", "document"), _is_text),
    ),
    "multi_label": (Role("text", ("text", "sentence", "content", "document", "review"), _is_text),),
    "seq2seq": (Role("source", ("document", "article", "dialogue", "source", "text", "input", "src"), _is_text),),
    "image_classification": (Role("image", ("image", "img", "picture"), _is_image),),
}
LABELS = {
    "question_answering": Role("answers", ("answers", "answer"), _is_answers),
    "multi_label": Role("labels", ("labels", "label", "tags", "topics", "categories"), _is_classes),
    "seq2seq": Role("target", ("summary", "highlights", "translation", "target", "output", "tgt"), _is_text),
    "image_classification": Role("label", ("label", "labels", "class", "fine_label"), _is_class),
}


def settled(task: Task, data_dir: Path | None, text: Sequence[str], label: str | None) -> Task:
    """The task with the columns of the data, those given or found, and with the names of its labels.

    Raises:
        LowRankError: the data cannot be read, a column cannot be told, or its labels are none.
    """
    task = with_library(task)
    split = "train" if data_dir is None or has_split(data_dir, "train") else task.validation[0]
    rows, wanted = load_rows(task, split, data_dir), INPUTS[task.kind]
    if len(text) > len(wanted):
        raise LowRankError(f"{task.name} reads {len(wanted)} columns ({_names(wanted)}), not {len(text)}")
    role = LABELS.get(task.kind)
    if label is not None and role is None:
        raise LowRankError(f"{task.name} has no labels, so no label column")
    asked = dict(zip((known.name for known in wanted), text, strict=False)) | ({role.name: label} if role else {})
    found: dict[str, str] = {}
    given = {*text, label}
    for known in (*wanted, *([role] if role else [])):
        found[known.name] = _column(known, asked.get(known.name), rows, task, {*found.values(), *given})
    say_once(f"columns of {task.name}: " + ", ".join(f"{name} = {column}" for name, column in found.items()))
    target = found[role.name] if role else None
    task = replace(task, text=tuple(found[known.name] for known in wanted), label=target)
    return _with_names(task, rows, data_name(task, data_dir)) if task.kind in NAMED else task


NAMED = ("multi_label", "image_classification")  # kinds whose labels have names


def _names(roles: Sequence[Role]) -> str:
    return ", ".join(role.name for role in roles)


def _column(role: Role, given: str | None, rows: Dataset, task: Task, taken: set[str | None]) -> str:
    """The column for a role: the one given, one with a usual name and the type, or the only one of the type."""
    features = rows.features
    if given is not None:
        if given not in features or not role.fits(features[given]):
            wrong = "is of another type" if given in features else "is not there"
            raise LowRankError(
                f"{task.name} needs {role.name} in the column {given!r}, which {wrong}; the columns are {_listed(rows)}"
            )
        return given
    fitting = [name for name, feature in features.items() if role.fits(feature) and name not in taken]
    usual = [name for known in role.names for name in fitting if name.lower().rpartition(".")[2] == known]
    if usual or len(fitting) == 1:
        return (usual or fitting)[0]
    option = "label_column" if role is LABELS.get(task.kind) else "text_columns"
    raise LowRankError(
        f"{task.name} does not find {role.name}: {'several columns fit' if fitting else 'no column fits'}; name it in "
        f"{option}, one of {_listed(rows)}"
    )


def _listed(rows: Dataset) -> str:
    return ", ".join(f"{name} ({_kind_of(feature)})" for name, feature in rows.features.items())


def _kind_of(feature: Any) -> str:
    kinds = {"text": _is_text, "image": _is_image, "answers": _is_answers, "class": _is_class, "classes": _is_classes}
    return next((name for name, fits in kinds.items() if fits(feature)), "something else")


def _with_names(task: Task, rows: Dataset, source: str) -> Task:
    """The task with the names of the labels that there are, and what stands in the data for each."""
    feature, values = rows.features[task.label], rows[task.label]
    classes = _inner(feature) or feature
    if isinstance(classes, ClassLabel):
        names: tuple[str, ...] = tuple(classes.names)
        return replace(task, label_names=names, label_values=tuple(range(len(names))))
    several = task.kind == "multi_label"
    found = {label for row in values if row is not None for label in (row if several else [row]) if label is not None}
    if not 2 <= len(found) <= MOST_LABELS:
        raise LowRankError(
            f"the column {task.label!r} of {source} holds {len(found):,} different labels; there must be 2 to "
            f"{MOST_LABELS:,}"
        )
    ordered = tuple(sorted(found))
    return replace(task, label_names=tuple(map(str, ordered)), label_values=ordered)
