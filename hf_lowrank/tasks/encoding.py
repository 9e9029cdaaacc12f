"""Rows of a task + tokenizer + a model's labels → inputs of the model, and batches of them."""

import copy
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.task import Task

IGNORED = -100


def encode(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Dataset:
    """Rows as inputs of a model, shortest first, so that batches need little padding.

    The labels are those of the model: mapped by name where the model names its labels as the data do, else by position.

    Raises:
        LowRankError: labels that are missing, of another type, or that the model does not know.
    """
    length = min(task.max_length, getattr(config, "max_position_embeddings", None) or task.max_length)
    tokenizer = copy.deepcopy(tokenizer)  # it remembers how it was called, and would be saved with that

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return _ENCODERS[task.kind](batch, task, tokenizer, length, label_ids)

    label_ids = label_ids_of(task, config)
    if task.label is not None:
        _check_labels(rows, task, len(label_ids))
    encoded = rows.map(tokenise, batched=True, remove_columns=rows.column_names, desc=f"tokenising {task.name}")
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return encoded.select(np.argsort(lengths, kind="stable"))


def collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What joins encoded rows into a padded batch."""
    if task.kind in ("classification", "regression"):
        return DataCollatorWithPadding(tokenizer)
    tokenizer = copy.deepcopy(tokenizer)  # what it needs here is not to be saved
    if tokenizer.pad_token is None:  # never seen: padding is masked, and its labels are ignored
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


def _encode_sequence(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    encoded = dict(tokenizer(*(batch[column] for column in task.text), truncation=True, max_length=length))
    labels = batch[task.label]
    encoded["labels"] = [label_ids[label] for label in labels] if label_ids else [float(label) for label in labels]
    return encoded


def _encode_words(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """A word's label goes to its first piece; the others, and special tokens, are ignored."""
    encoded = tokenizer(batch[task.text[0]], is_split_into_words=True, truncation=True, max_length=length)
    labels = []
    for row, tags in enumerate(batch[task.label]):
        words = encoded.word_ids(row)
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels.append([label_ids[tags[word]] if new else IGNORED for word, new in zip(words, first, strict=True)])
    return {**encoded, "labels": labels}


def _encode_text(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    texts = [text for text in batch[task.text[0]] if text.strip()]
    if task.packed:
        lines = (text if text.endswith("\n") else f"{text}\n" for text in texts)
        ids = tokenizer("".join(lines))["input_ids"]
        blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
    else:
        blocks = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    blocks = [block for block in blocks if len(block) > 1]  # a single token predicts nothing
    return {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks], "labels": blocks}


_ENCODERS = {
    "classification": _encode_sequence,
    "regression": _encode_sequence,
    "token_classification": _encode_words,
    "causal_lm": _encode_text,
}


def label_ids_of(task: Task, config: PreTrainedConfig) -> list[int]:
    """The model's label for each label of the data; none where they are not classes."""
    if not task.label_names:
        return []
    by_name = {str(name).lower(): int(label) for label, name in (config.id2label or {}).items()}
    names = [name.lower() for name in task.label_names]
    if all(name in by_name for name in names):
        return [by_name[name] for name in names]
    if len(by_name) != len(names):
        raise LowRankError(
            f"the model has {len(by_name)} labels ({', '.join(by_name)}), "
            f"{task.name} has {len(names)} ({', '.join(names)})"
        )
    return list(range(len(names)))


def _check_labels(rows: Dataset, task: Task, classes: int) -> None:
    labels = rows[task.label]
    if task.kind == "token_classification":
        labels = [label for row in labels for label in row]
    if task.kind == "regression":
        bad = [label for label in labels if not isinstance(label, (int, float)) or label != label]
    else:
        bad = [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]
    if bad:
        raise LowRankError(
            f"{len(bad)} labels of {task.name} are not usable, such as {bad[0]!r} in column {task.label!r}"
            + (f"; they must be 0 to {classes - 1}" if classes else "; they must be numbers")
        )
