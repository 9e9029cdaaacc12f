"""A task and where its data are → the rows of a split."""

from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.encoding import encode
from hf_lowrank.tasks.task import Task

FILE_FORMATS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json", "txt": "text"}


def load_split(task: Task, split: str, data_dir: Path | None) -> Dataset:
    """The rows of a split: of `data_dir/<split>*.{parquet,csv,json,jsonl}`, or of the task's Hub data set.

    Raises:
        LowRankError: no such file, an unreadable one, or columns of the task that are not there.
    """
    if data_dir is None and not task.hub[0]:
        raise LowRankError(f"{task.name} has no data set of its own; pass a folder with --data-dir")
    source = f"{task.hub[0]} ({split})" if data_dir is None else str(data_dir)
    try:
        if data_dir is None:
            rows = load_dataset(*task.hub, split=split)
        else:
            file_format, files = _local_files(data_dir, split)
            options = {"keep_linebreaks": True} if file_format == "text" else {}
            rows = load_dataset(file_format, data_files=files, split="train", **options)
    except LowRankError:
        raise
    except Exception as error:  # datasets raises its own, pyarrow's, pandas' and network errors
        raise LowRankError(f"the data of {task.name} cannot be read from {source}: {error}") from error
    needed = [*task.text, *([task.label] if task.label else [])]
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        raise LowRankError(
            f"{task.name} needs the column {missing[0]!r}, which {source} has not for {split!r}; "
            f"its columns are {', '.join(rows.column_names)}"
        )
    return _numbered(rows, task) if task.label_values else rows


def _numbered(rows: Dataset, task: Task) -> Dataset:
    """The rows with labels 0, 1, … instead of the values that stand in the data."""
    numbers = {value: number for number, value in enumerate(task.label_values)}
    labels = rows[task.label]
    unknown = [label for label in labels if label not in numbers]
    if unknown:
        raise LowRankError(
            f"{len(unknown)} labels of {task.name} are not among those of the training data "
            f"({', '.join(task.label_names)}), such as {unknown[0]!r}"
        )
    return rows.remove_columns([task.label]).add_column(task.label, [numbers[label] for label in labels])


def load_validation(
    task: Task, data_dir: Path | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[Dataset]:
    """The encoded rows of every validation split of the task."""
    return [encode(load_split(task, split, data_dir), task, tokenizer, config) for split in task.validation]


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder has files of a split."""
    return any(path.suffix.removeprefix(".") in FILE_FORMATS for path in folder.glob(f"{split}*"))


def _local_files(folder: Path, split: str) -> tuple[str, list[str]]:
    for suffix, file_format in FILE_FORMATS.items():
        files = sorted(str(path) for path in folder.glob(f"{split}*.{suffix}"))
        if files:
            return file_format, files
    raise LowRankError(f"{folder} has no {split}.parquet (or .csv, .json, .jsonl, .txt)")
