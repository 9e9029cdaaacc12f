"""Rows of running text → windows of equal length: all of them in order, or some chosen by a seed."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.checks import check_rows
from hf_lowrank.tasks.task import Task

PART = 2**24  # characters that are tokenised at once
BLOCK = 1000  # rows that stay together where windows are chosen
MIXED = 10_000  # rows of a stream that are held to be mixed
MORE = 4  # windows to choose from, over those wanted


def windows(texts: Sequence[str], task: Task, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """The texts joined, and cut into windows of `length` tokens that do not overlap; a shorter rest is dropped.

    So perplexities of language models are measured in the literature (GPTQ, SparseGPT and what followed), where the
    separator is a blank line and the length 2,048.

    Raises:
        LowRankError: the text is empty, or shorter than a window.
    """
    _refuse_empty(texts, task)
    return _rows(_cut([_ids(texts, task, tokenizer)], task, length))


def chosen_windows(
    texts: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> Dataset:
    """`count` windows (all, if there are fewer), chosen by the seed, of blocks of rows that follow each other.

    As many blocks are read, in an order of the seed's, as hold `MORE` times as many windows.

    Raises:
        LowRankError: the text is empty, or shorter than a window.
    """
    _refuse_empty(texts[task.text[0]], task)
    draw = np.random.default_rng(seed)
    blocks: list[np.ndarray] = []
    for start in map(int, draw.permutation(range(0, len(texts), BLOCK))):
        blocks.append(_ids(texts[start : start + BLOCK][task.text[0]], task, tokenizer, special=start == 0))
        if _count(blocks, length) >= MORE * count:
            break
    found = _cut(blocks, task, length)
    return _rows(found[np.sort(draw.permutation(len(found))[:count])])


def streamed_windows(
    texts: IterableDataset, task: Task, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> Dataset:
    """As `chosen_windows`, of a stream mixed by the seed, of which no more blocks are read than hold so many windows.

    Raises:
        LowRankError: the text is shorter than a window, or a row is no text.
    """
    rows = iter(texts.shuffle(seed=seed, buffer_size=MIXED))
    blocks: list[np.ndarray] = []
    while _count(blocks, length) < count and (block := list(islice(rows, BLOCK))):
        column = {task.text[0]: [row.get(task.text[0]) for row in block]}
        check_rows(Dataset.from_dict(column), task, 0)
        blocks.append(_ids(column[task.text[0]], task, tokenizer, special=False))
    return _rows(_cut(blocks or [np.empty(0, np.int32)], task, length)[:count])


def rows_at_once(rows: Any, task: Task, batch_size: int) -> int:
    """Rows in a batch: `batch_size`, of windows as `Task.at_once` says."""
    return task.at_once(batch_size, len(rows[0]["input_ids"])) if task.packed and len(rows) else batch_size


def _refuse_empty(texts: Iterable[str], task: Task) -> None:
    if not any(text.strip() for text in texts):
        raise LowRankError(f"the texts of {task.name} are empty: there is nothing to predict")


def _count(blocks: Iterable[np.ndarray], length: int) -> int:
    """The windows in runs of token ids."""
    return sum(len(ids) // length for ids in blocks)


def _ids(texts: Iterable[str], task: Task, tokenizer: PreTrainedTokenizerBase, special: bool = True) -> np.ndarray:
    """The token ids of the texts joined, with the tokenizer's special tokens where the text begins if `special`."""
    parts = [
        np.array(tokenizer(part, verbose=False, add_special_tokens=special and number == 0)["input_ids"], np.int32)
        for number, part in enumerate(_parts(texts, task.separator))
    ]
    return np.concatenate([*parts, np.empty(0, np.int32)])


def _parts(texts: Iterable[str], separator: str | None) -> Iterator[str]:
    """The texts joined, in parts of `PART` characters or a little more."""
    part, size = [], 0
    for number, text in enumerate(texts):
        ended = text if separator is not None or text.endswith("\n") else f"{text}\n"
        part.append(f"{separator}{ended}" if separator is not None and number > 0 else ended)
        size += len(part[-1])
        if size >= PART:
            yield "".join(part)
            part, size = [], 0
    if size:
        yield "".join(part)


def _cut(blocks: Sequence[np.ndarray], task: Task, length: int) -> np.ndarray:
    """All windows [windows, length] of runs of token ids; where no run holds any, of all of them behind each other."""
    if not any(len(ids) >= length for ids in blocks):
        blocks = [np.concatenate(blocks)]
    whole = [ids[: len(ids) // length * length].reshape(-1, length) for ids in blocks]
    found = np.concatenate(whole)
    if not len(found):
        raise LowRankError(
            f"the text of {task.name} is {sum(map(len, blocks)):,} tokens long, less than a window of {length:,}; "
            "give more text, or a smaller max_length"
        )
    return found


def _rows(found: np.ndarray) -> Dataset:
    ids = found.tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": np.ones_like(found).tolist(), "labels": ids})
