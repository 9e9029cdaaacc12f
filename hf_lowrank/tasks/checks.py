"""Rows, task, model → nothing, or one line on what in the rows, or in the length they are cut at, cannot be."""

import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.chats import is_chat
from hf_lowrank.tasks.task import Task


def checked_length(task: Task, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """The tokens that a text is cut at: the task's, or the most that the model reads where that is less.

    Raises:
        LowRankError: more was asked for than the model reads, or less than one token beside the special ones.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit > 0]
    most = int(min([*limits, sys.maxsize]))
    least = 2 if task.kind == "causal_lm" else 1 + tokenizer.num_special_tokens_to_add(len(task.text) > 1)
    length = min(task.max_length, most)
    if task.length_asked and task.max_length > most:
        raise LowRankError(f"the model reads {most:,} tokens at most; max_length {task.max_length:,} is too long")
    if length < least:
        raise LowRankError(f"max_length {length} is too short for {task.name}: {least} tokens are the least here")
    return length


def check_ends(rows: Iterable[Sequence[int]], task: Task, config: PreTrainedConfig) -> None:
    """Raise where an encoder-decoder cannot tell where a text ends: its classifiers read the output at the end tokens.

    Raises:
        LowRankError: the tokenizer puts none, or not the same number into every row.
    """
    if not getattr(config, "is_encoder_decoder", False) or task.kind not in (
        "classification",
        "regression",
        "multi_label",
    ):
        return
    ends = {list(ids).count(config.eos_token_id) for ids in rows}
    if ends == {0} or len(ends) > 1:
        raise LowRankError(
            f"this encoder-decoder reads {task.name} at the end token (id {config.eos_token_id}), which its tokenizer "
            f"puts {' or '.join(map(str, sorted(ends)))} times into a row; it must be the same number, at least 1"
        )


def check_rows(rows: Dataset, task: Task, classes: int) -> None:
    """Raise where a text or a label is not what the task needs; `classes` is the number of labels, 0 for none.

    Raises:
        LowRankError: it names the column, a value and its row.
    """
    words = task.kind == "token_classification" and task.texts is None
    for column in task.text if task.kind != "image_classification" else ():
        kind, usable = ("a list of words", _is_words) if words else _CHATS if task.chat else ("a text", _is_text)
        _refuse(rows[column], column, usable, f"{task.name} needs {kind} there")
    if task.label is None:
        return
    if task.kind in _LABELS:
        _refuse(rows[task.label], task.label, *_LABELS[task.kind](task))
        return
    if words:
        _refuse(rows[task.label], task.label, _is_list, f"{task.name} needs a list of labels there")
        _check_lengths(rows, task)
    labels = [label for row in rows[task.label] for label in row] if words else rows[task.label]
    if task.kind in ("regression", "similarity"):
        bad = [label for label in labels if not isinstance(label, (int, float)) or not math.isfinite(label)]
    else:
        bad = [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]
    if bad:
        raise LowRankError(
            f"{len(bad)} labels of {task.name} are not usable, such as {bad[0]!r} in column {task.label!r}"
            + (f"; they must be 0 to {classes - 1}, whole numbers" if classes else "; they must be numbers")
        )


def _refuse(values: Sequence[Any], column: str, usable: Callable[[Any], bool], needed: str) -> None:
    bad = [(number, value) for number, value in enumerate(values) if not usable(value)]
    if bad:
        number, value = bad[0]
        raise LowRankError(
            f"{len(bad)} of {len(values)} rows of the column {column!r} are not usable, such as {reprlib.repr(value)} "
            f"in row {number}; {needed}"
        )


def _check_lengths(rows: Dataset, task: Task) -> None:
    pairs = zip(rows[task.text[0]], rows[task.label], strict=True)
    for number, (words, labels) in enumerate(pairs):
        if len(words) != len(labels):
            raise LowRankError(
                f"row {number} has {len(words)} words in {task.text[0]!r} and {len(labels)} labels in {task.label!r}; "
                f"{task.name} needs one for each"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


_CHATS = ("a list of messages with role and content", is_chat)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _are_answers(value: Any) -> bool:
    """Whether it is a dict of as many texts as places."""
    known: dict[str, Any] = value if isinstance(value, dict) else {}
    texts, starts = known.get("text", []), known.get("answer_start", [])
    whole = _is_words(texts) and isinstance(starts, list) and len(starts) == len(texts)
    return whole and all(isinstance(start, int) and start >= 0 for start in starts)


def _are_labels(value: Any) -> bool:
    return isinstance(value, list) and len(set(value)) == len(value)


def _answers(task: Task) -> tuple[Callable[[Any], bool], str]:
    return _are_answers, f"{task.name} needs lists text and answer_start there, equally long"


def _labels(task: Task) -> tuple[Callable[[Any], bool], str]:
    return _are_labels, f"{task.name} needs a list of the labels that apply there, each of them once"


def _written(task: Task) -> tuple[Callable[[Any], bool], str]:
    return _is_text, f"{task.name} needs a text there"


_LABELS = {"question_answering": _answers, "multi_label": _labels, "seq2seq": _written}
