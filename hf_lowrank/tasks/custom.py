"""A person's own files and the names of their columns → a task, its kind and labels read from the data."""

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Value

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.data import has_split, load_split
from hf_lowrank.tasks.metrics import correlation, macro_f1
from hf_lowrank.tasks.task import Task

MOST_CLASSES = 1_000


def custom_task(data_dir: Path | None, text: tuple[str, ...], label: str | None) -> Task:
    """Classification of one or two text columns, or regression where the labels are fractions.

    Labels are those of the training rows (of the validation rows where there are no others), in their order.

    Raises:
        LowRankError: the folder or a column is not given or not there; labels of a kind that is no label.
    """
    if data_dir is None or label is None or not 1 <= len(text) <= 2:
        raise LowRankError(
            "the task 'custom' needs a folder of files as data_dir, one or two text_columns and a label_column"
        )
    split = "train" if has_split(data_dir, "train") else "validation"
    regression = Task("custom", "regression", text, label, ("", None), "pearson_spearman", correlation)
    rows = load_split(regression, split, data_dir)
    values = _values(rows, label, data_dir)
    if any(isinstance(value, float) for value in values):
        return regression
    feature = rows.features[label]
    names = tuple(feature.names if isinstance(feature, ClassLabel) else map(str, values))
    values = tuple(range(len(names))) if isinstance(feature, ClassLabel) else values
    return Task("custom", "classification", text, label, ("", None), "accuracy", macro_f1, names, label_values=values)


def _values(rows: Dataset, label: str, data_dir: Path) -> tuple[Any, ...]:
    """The distinct labels in order, without missing ones."""
    if not isinstance(rows.features[label], (Value, ClassLabel)):
        raise LowRankError(
            f"the column {label!r} of {data_dir} holds {rows[label][0]!r}; a label is a name or a number"
        )
    found = {value for value in rows.unique(label) if value is not None}
    fractions = any(isinstance(value, float) for value in found)
    if len(found) < 2 or (not fractions and len(found) > MOST_CLASSES):
        raise LowRankError(
            f"the column {label!r} of {data_dir} holds {len(found):,} different labels; "
            f"there must be 2 to {MOST_CLASSES:,}"
        )
    return tuple(sorted(found))
