"""Rows of a task + tokenizer + a model's labels → inputs of the model, and batches of them."""

import copy
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import say_once
from hf_lowrank.model.predictions import IGNORED, UNKNOWN, UNKNOWN_NUMBER
from hf_lowrank.tasks.chats import encode_chats
from hf_lowrank.tasks.checks import check_ends, check_rows, checked_length
from hf_lowrank.tasks.images import ImageCollator, encode_images, stored_images
from hf_lowrank.tasks.labels import label_ids_of, mapping_note
from hf_lowrank.tasks.masked import encode_masked
from hf_lowrank.tasks.multi_label import FlagsCollator, encode_labels
from hf_lowrank.tasks.questions import encode_questions, question_collator
from hf_lowrank.tasks.sequences import PairCollator, encode_pairs
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.windows import chosen_windows, streamed_windows, windows


def encode(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Dataset:
    """Rows as inputs of a model, shortest first, so that batches need little padding.

    The labels are those of the model: mapped by name where the model names its labels as the data do, else by position,
    which is said on stderr. Of a task without labels they are `UNKNOWN`, of numbers `UNKNOWN_NUMBER`.

    Raises:
        LowRankError: texts that are none; labels that are missing, of another type, or that the model does not know; a
            length that the model cannot read, or in which no text has room; nothing is left.
    """
    length = 0 if task.kind == "image_classification" else checked_length(task, tokenizer, config)
    tokenizer = copy.deepcopy(tokenizer)  # it remembers how it was called, and would be saved with that

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return _ENCODERS[task.kind](batch, task, tokenizer, length, label_ids)

    label_ids = label_ids_of(task, config)
    check_rows(rows, task, len(label_ids))
    if said := mapping_note(task, config):
        say_once(said)
    if task.packed:
        return windows(rows[task.text[0]], task, tokenizer, length)
    rows = _prepared(rows, task)
    encoded = rows.map(tokenise, batched=True, remove_columns=rows.column_names, desc=f"tokenising {task.name}")
    if not len(encoded):
        raise LowRankError(f"the texts of {task.name} are empty: there is nothing to predict")
    if "input_ids" in encoded.column_names:
        check_ends(encoded["input_ids"], task, config)
    return encoded.select(np.argsort(lengths_of(encoded), kind="stable"))


def lengths_of(rows: Dataset) -> list[int]:
    """The tokens of every encoded row, 1 of what is none."""
    return [len(ids) for ids in rows["input_ids"]] if "input_ids" in rows.column_names else [1] * len(rows)


def _prepared(rows: Dataset, task: Task) -> Dataset:
    """The rows that are to be encoded, with what their kind needs besides."""
    if task.kind in ("causal_lm", "masked_lm") and not task.chat:
        return rows.select([number for number, text in enumerate(rows[task.text[0]]) if text.strip()])
    if task.kind == "question_answering":
        beside = [name for name in ("example",) if name in rows.column_names]
        return rows.remove_columns(beside).add_column("example", list(range(len(rows))))
    return stored_images(rows, task) if task.kind == "image_classification" else rows


def encode_chosen(
    rows: Dataset | IterableDataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    count: int,
    seed: int,
) -> Dataset:
    """As `encode`, of `count` samples (all, if there are fewer) chosen by the seed: rows, or windows of running text.

    Raises:
        LowRankError: as `encode`.
    """
    if task.packed:
        wanted: Any = (task, tokenizer, checked_length(task, tokenizer, config), count, seed)
        if not isinstance(rows, Dataset):
            return streamed_windows(rows, *wanted)
        check_rows(rows, task, 0)
        return chosen_windows(rows, *wanted)
    shuffled = rows.shuffle(seed=seed)
    return encode(shuffled.select(range(min(count, len(rows)))), task, tokenizer, config)


def collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What joins encoded rows into a padded batch."""
    if task.kind in ("classification", "regression", "embedding", "similarity"):
        return DataCollatorWithPadding(tokenizer)
    if task.kind in _COLLATORS:
        return _COLLATORS[task.kind](tokenizer)
    tokenizer = copy.deepcopy(tokenizer)  # what it needs here is not to be saved
    if tokenizer.pad_token is None:  # never seen: padding is masked, and its labels are ignored
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


def _encode_sequence(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    encoded = dict(tokenizer(*(batch[column] for column in task.text), truncation=True, max_length=length))
    if task.label is None:
        encoded["labels"] = [UNKNOWN_NUMBER if task.kind == "regression" else UNKNOWN] * len(encoded["input_ids"])
        return encoded
    labels = batch[task.label]
    encoded["labels"] = [label_ids[label] for label in labels] if label_ids else [float(label) for label in labels]
    return encoded


def _encode_apart(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """Every text of a pair is a row of its own."""
    encoded = dict(
        tokenizer([text for column in task.text for text in batch[column]], truncation=True, max_length=length)
    )
    return {**encoded, "labels": [UNKNOWN] * len(encoded["input_ids"])}


def _encode_words(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """A word's label goes to its first piece; the others, and special tokens, are ignored."""
    if not tokenizer.is_fast:
        raise LowRankError(f"{task.name} needs a fast tokenizer, which knows the words of its tokens; this one is slow")
    texts = batch[task.text[0]]
    split = not isinstance(texts[0], str)
    encoded = tokenizer(texts, is_split_into_words=split, truncation=True, max_length=length)
    labels = []
    for row in range(len(texts)):
        words = encoded.word_ids(row)
        known = [UNKNOWN] * len(words) if task.label is None else [label_ids[tag] for tag in batch[task.label][row]]
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels.append([known[word] if new else IGNORED for word, new in zip(words, first, strict=True)])
    return {**encoded, "labels": labels}


def _encode_text(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    if task.chat:
        return encode_chats(batch[task.text[0]], tokenizer, length)
    texts = tokenizer(batch[task.text[0]], truncation=True, max_length=length)["input_ids"]
    texts = [ids for ids in texts if len(ids) > 1]  # a single token predicts nothing
    return {"input_ids": texts, "attention_mask": [[1] * len(ids) for ids in texts], "labels": texts}


_ENCODERS = {
    "classification": _encode_sequence,
    "regression": _encode_sequence,
    "token_classification": _encode_words,
    "causal_lm": _encode_text,
    "masked_lm": encode_masked,
    "embedding": _encode_sequence,
    "similarity": _encode_apart,
    "question_answering": encode_questions,
    "multi_label": encode_labels,
    "seq2seq": encode_pairs,
    "image_classification": encode_images,
}

_COLLATORS: dict[str, Any] = {
    "question_answering": question_collator,
    "multi_label": FlagsCollator,
    "seq2seq": PairCollator,
    "image_classification": ImageCollator,
}
