"""A task and where its data are → the rows of a split."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, get_dataset_split_names, load_dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import SPAN
from hf_lowrank.tasks.encoding import encode
from hf_lowrank.tasks.questions import unfolded
from hf_lowrank.tasks.task import Task, Texts

FEW_TEXTS, HELD_OUT = 20, 10

# The columns of encoded rows that say what a model reads and is to say, of which there are two at least.
READ = ("input_ids", "encoded_image", "labels", *SPAN, "known_answers")

VALIDATION = ("validation", "valid", "val", "dev", "test")  # what held-out data are called, the first that there is

FILE_FORMATS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json", "txt": "text"}


def load_split(task: Task, split: str, data_dir: Path | None) -> Dataset:
    """The rows of a split: of `data_dir/<split>*.{parquet,csv,json,jsonl,txt}`, or of the task's Hub data set.

    Of a task's own texts every tenth is for validation, the rest for training; fewer than `FEW_TEXTS` are for both.

    Raises:
        LowRankError: no such file, an unreadable or empty one, or columns of the task that are not there.
    """
    if task.texts is not None:
        return _split_of_texts(task.texts, split)
    rows = load_rows(task, split, data_dir)
    source = data_name(task, data_dir)
    needed = [*task.text, *([task.label] if task.label else [])]
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        option = "label_column" if missing[0] == task.label else "text_columns"
        raise LowRankError(
            f"{task.name} needs the column {missing[0]!r}, which {source} has not for {split!r}; "
            f"its columns are {', '.join(rows.column_names)}: name the right one in {option}"
        )
    return _numbered(rows, task) if task.label_values else rows


def load_rows(task: Task, split: str, data_dir: Path | None) -> Dataset:
    """The rows of a split with all their columns; of translations, a column for each language, of questions flat ones.

    Raises:
        LowRankError: no such file, or an unreadable or empty one.
    """
    if data_dir is None and not task.hub[0]:
        raise LowRankError(f"{task.name} has no data set of its own; pass a folder as data_dir")
    source = f"{task.hub[0]} ({split})"
    own_split = task.training if split == "train" else split
    given: dict[str, Any] = {"path": task.hub[0], "name": task.hub[1], "split": own_split}
    if data_dir is not None:
        source, given = _local(data_dir, split)
    try:
        rows = load_dataset(**given)
    except Exception as error:  # datasets raises its own, pyarrow's, pandas' and network errors
        raise LowRankError(f"the data of {task.name} cannot be read from {source}: {reason(error)}") from error
    if not len(rows):
        raise LowRankError(f"{source} has no rows; {task.name} needs one for {split!r} at least")
    if task.kind == "question_answering":
        return unfolded(rows)
    return rows.flatten() if task.kind == "seq2seq" else rows


def training_rows(task: Task, data_dir: Path | None) -> Dataset | IterableDataset:
    """The rows that samples are chosen from: those of `load_split`, or a stream of them where no more is to be read.

    Raises:
        LowRankError: as `load_split`.
    """
    if not task.streamed or data_dir is not None:
        return load_split(task, "train", data_dir)
    try:
        rows = load_dataset(*task.hub, split=task.training, streaming=True)
        columns = [*next(iter(rows))]
    except StopIteration:
        raise LowRankError(f"{task.hub[0]} ({task.training}) has no rows") from None
    except Exception as error:  # datasets raises its own, pyarrow's and network errors
        raise LowRankError(f"the data of {task.name} cannot be read from {task.hub[0]}: {reason(error)}") from error
    if task.text[0] not in columns:
        raise LowRankError(
            f"{task.hub[0]} has no column {task.text[0]!r}; name the one with the text in text_columns, of "
            f"{', '.join(columns)}"
        )
    return rows


def on_hub(task: Task, dataset: str, training: str) -> Task:
    """The task on another data set, a folder's or the Hub's name with a config behind a colon where it has several.

    Running text is streamed, and needs no split to validate on, unless it is to be scored.

    Args:
        task: one without data of its own.
        dataset: its name.
        training: the split to measure and train on.

    Raises:
        LowRankError: there is no such data set, or it lacks a split.
    """
    name, _, config = dataset.partition(":")
    try:
        splits = get_dataset_split_names(name, config or None)
    except Exception as error:  # datasets raises its own and network errors
        raise LowRankError(f"the data set {dataset} cannot be read: {reason(error)}") from error
    held_out = [split for split in VALIDATION if split in splits]
    if training not in splits or not (held_out or task.packed):
        needed = training if task.packed else f"{training}, and validation or test"
        raise LowRankError(f"{dataset} has the splits {', '.join(splits)}; it takes {needed}")
    validation = tuple(held_out[:1]) or task.validation
    return replace(task, hub=(name, config or None), training=training, validation=validation, streamed=task.packed)


def _split_of_texts(texts: Texts, split: str) -> Dataset:
    held_out = [number % HELD_OUT == HELD_OUT - 1 for number in range(len(texts.rows))]
    wanted = [out == (split != "train") or len(texts.rows) < FEW_TEXTS for out in held_out]
    rows = [row for row, chosen in zip(texts.rows, wanted, strict=True) if chosen]
    return Dataset.from_dict(dict(zip(texts.columns, map(list, zip(*rows, strict=True)), strict=True)))


def reason(error: BaseException) -> str:
    """What is wrong with a file, in one line: the first cause, which datasets wraps in words of its own."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    said = " ".join(map(str, causes))
    if "utf-8" in said.lower() or "UTF8" in said:
        return "it is not UTF-8; save it as UTF-8"
    if "corresponds to no data" in said or "at least one example" in said:
        return "it has no rows"
    if "gated dataset" in said:
        return "it is gated: ask for access on its page on the Hub, and log in with 'hf auth login'"
    if "exist on the Hub" in said:
        return "there is no such data set on the Hub, or it is private: check the name, or log in with 'hf auth login'"
    if "Couldn't reach" in said:
        return "the Hub cannot be reached, and it was not read before; give a folder of files as data_dir"
    if "Config name is missing" in said:
        return " ".join(str(causes[-1]).split("\n")[:2])  # and which ones there are
    lines = str(causes[-1]).strip().splitlines()
    return lines[0] if lines else type(causes[-1]).__name__


def described(validation: Sequence[Dataset], task: Task, data_dir: Path | None) -> dict[str, Any]:
    """What a score was measured on: name of the data, splits, rows, and a digest of what the model reads in them."""
    return {
        "data": data_name(task, data_dir),
        "splits": list(task.validation),
        "rows": sum(map(len, validation)),
        "digest": content_digest(validation),
    }


def data_name(task: Task, data_dir: Path | None) -> str:
    """How data are called in records: a data set of the Hub, or the last part of a folder's path."""
    return task.hub[0] if data_dir is None else data_dir.resolve().name


def content_digest(splits: Sequence[Dataset], *, in_order: bool = False) -> str:
    """A digest of what is read and to be said of encoded rows, whatever their order unless it counts."""
    digest = hashlib.blake2b(digest_size=16)
    for rows in splits:
        pairs = zip(*(rows[column] for column in READ if column in rows.column_names), strict=True)
        digests = [hashlib.blake2b(repr(pair).encode(), digest_size=16).digest() for pair in pairs]
        digest.update(len(digests).to_bytes(8, "big") + b"".join(digests if in_order else sorted(digests)))
    return digest.hexdigest()


def _numbered(rows: Dataset, task: Task) -> Dataset:
    """The rows with labels 0, 1, … instead of the values that stand in the data."""
    numbers = {value: number for number, value in enumerate(task.label_values)}
    labels = rows[task.label]
    several = task.kind == "multi_label"
    unknown = [label for row in labels for label in (row or [] if several else [row]) if label not in numbers]
    if unknown:
        raise LowRankError(
            f"{len(unknown)} labels of {task.name} are not among those of the training data "
            f"({', '.join(task.label_names)}), such as {unknown[0]!r}"
        )
    own = [row and [numbers[label] for label in row] if several else numbers[row] for row in labels]
    return rows.remove_columns([task.label]).add_column(task.label, own)


def load_validation(
    task: Task, data_dir: Path | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[Dataset]:
    """The encoded rows of every validation split of the task."""
    return [encode(load_split(task, split, data_dir), task, tokenizer, config) for split in task.validation]


def refuse_no_folder(folder: Path) -> None:
    """Raise where the data are to be in a folder that is none.

    Raises:
        LowRankError: there is no such folder, or it is a file.
    """
    if not folder.is_dir():
        reason = "is a file" if folder.is_file() else "does not exist"
        raise LowRankError(f"{folder} {reason}; the data are a folder with train and validation files")


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder has files, or a folder of images, of a split."""
    return (folder / split).is_dir() or any(
        path.suffix.removeprefix(".") in FILE_FORMATS for path in folder.glob(f"{split}*")
    )


def _local(folder: Path, split: str) -> tuple[str, dict[str, Any]]:
    """What the rows of a split are called, and how `load_dataset` reads them: a folder of images for each class."""
    refuse_no_folder(folder)
    images = folder / split
    if images.is_dir():
        return str(images), {"path": "imagefolder", "data_dir": str(images), "split": "train"}
    file_format, files = _local_files(folder, split)
    given: dict[str, Any] = {"path": file_format, "data_files": files, "split": "train"}
    given |= {"keep_linebreaks": True} if file_format == "text" else {}
    return files[0] if len(files) == 1 else f"{folder} ({split})", given


def _local_files(folder: Path, split: str) -> tuple[str, list[str]]:
    for suffix, file_format in FILE_FORMATS.items():
        files = sorted(str(path) for path in folder.glob(f"{split}*.{suffix}") if path.is_file())
        if files:
            return file_format, files
    names = sorted(path.name for path in folder.iterdir())
    there = f"it holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "it is empty"
    raise LowRankError(f"{folder} has no {split}.parquet (or .csv, .json, .jsonl, .txt): {there}")
