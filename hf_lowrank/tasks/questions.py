"""Questions, texts that hold the answers, and where → inputs of a model that marks answers; its marks → answers.

The columns are those of SQuAD (Rajpurkar et al., 2016; 2018): `answers` holds lists `text` and `answer_start`, empty
where the text has no answer. Its own files, which nest questions in paragraphs and these in articles, are read too. A
text that is too long is read in windows that overlap.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import DataCollatorWithPadding

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import SPAN
from hf_lowrank.tasks.task import Task

OVERLAP = 128  # tokens that two windows share at most, a quarter of a window where that is less
LONGEST = 30  # tokens of an answer
OUTSIDE = [-1, -1]  # in place of where a token of the question, or a special one, stands in the text
BESIDE = ("example", "places", "context", "known_answers")  # columns of encoded rows that are no inputs

ROWS = Features(
    question=Value("string"),
    context=Value("string"),
    answers={"text": List(Value("string")), "answer_start": List(Value("int64"))},
)


def unfolded(rows: Dataset) -> Dataset:
    """The questions of SQuAD's own files, a row each; other rows as they are.

    Raises:
        LowRankError: an article, a paragraph or a question lacks what SQuAD's have.
    """
    inner = getattr(rows.features.get("data"), "feature", None)
    if not isinstance(inner, dict) or "paragraphs" not in inner:
        return rows
    articles = [article for nested in rows["data"] for article in nested or []]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    try:
        found = [_unfolded(asked, paragraph["context"]) for paragraph in paragraphs for asked in paragraph["qas"]]
    except (KeyError, TypeError) as error:
        raise LowRankError(
            f"the data are nested as SQuAD's, but not all of them: {error!r} where one is read"
        ) from error
    return Dataset.from_list(found, features=ROWS)


def _unfolded(asked: dict[str, Any], context: str) -> dict[str, Any]:
    answers = asked.get("answers") or []
    columns = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
    return {"question": asked["question"], "context": context, "answers": columns}


def encode_questions(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """A row for each window of a text; without the answer in it, it begins and ends at the first token (CLS).

    Raises:
        LowRankError: the tokenizer is slow, or a question leaves no room for the text.
    """
    if not tokenizer.is_fast:
        raise LowRankError(f"{task.name} needs a fast tokenizer, which knows where its tokens stand; this one is slow")
    questions, contexts = ([text.lstrip() for text in batch[task.text[0]]], batch[task.text[1]])
    options: dict[str, Any] = {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    overlap = _overlap(questions, task, tokenizer, length)
    encoded = tokenizer(questions, contexts, truncation="only_second", max_length=length, stride=overlap, **options)
    rows = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    columns: dict[str, Any] = dict(encoded)
    columns["places"] = [
        [list(place) if part == 1 else OUTSIDE for place, part in zip(places, encoded.sequence_ids(n), strict=True)]
        for n, places in enumerate(offsets)
    ]
    columns |= {"example": [batch["example"][row] for row in rows], "context": [contexts[row] for row in rows]}
    if task.label is not None:
        answers = [batch[task.label][row] for row in rows]
        columns["known_answers"] = [list(known["text"]) for known in answers]
        marks = [_marks(*pair) for pair in zip(columns["places"], answers, strict=True)]
        columns |= dict(zip(SPAN, map(list, zip(*marks, strict=True)), strict=True))
    return columns


def _overlap(questions: Sequence[str], task: Task, tokenizer: Any, length: int) -> int:
    """The tokens that windows of this length share, fewer than every question leaves to its text."""
    overlap = min(OVERLAP, length // 4)
    longest = max(len(ids) for ids in tokenizer(list(questions), add_special_tokens=False)["input_ids"])
    if length - longest - tokenizer.num_special_tokens_to_add(True) <= overlap:
        raise LowRankError(
            f"a question of {task.name} is {longest} tokens long, which leaves too little of {length} to its text; "
            "raise max_length, or shorten the question"
        )
    return overlap


def _marks(places: list[list[int]], answers: dict[str, Any]) -> tuple[int, int]:
    """The first and last token of the first answer, 0 and 0 where it is not in the window."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    within = [token for token, (first, last) in enumerate(places) if last > start and first < end and first >= 0]
    whole = within and places[within[0]][0] <= start and places[within[-1]][1] >= end
    return (within[0], within[-1]) if whole else (0, 0)


class QuestionCollator(DataCollatorWithPadding):
    """Joins the inputs of windows, and the marks where there are some."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        kept = [{key: value for key, value in row.items() if key not in BESIDE} for row in features]
        return dict(super().__call__(kept))


def question_collator(tokenizer: Any) -> QuestionCollator:
    """What joins windows, padded behind their end, so that marks stay where they are; the tokenizer is left alone."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # never seen: padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return QuestionCollator(tokenizer)


def best_spans(logits: Tensor, rows: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Of every window the likeliest answer: `example`, `text`, its `score`, and that of there being `none`.

    Args:
        logits: of where answers begin and end [windows, 2, tokens].
        rows: the encoded windows, by column.
    """
    found = []
    for (start, end), example, places, context in zip(
        logits, rows["example"], rows["places"], rows["context"], strict=True
    ):
        inside = torch.tensor([first >= 0 and last > first for first, last in places]).nonzero()[:, 0]
        none = float(start[0] + end[0])
        if not len(inside):
            found.append({"example": example, "text": "", "score": none, "none": none})
            continue
        scores = start[inside][:, None] + end[inside][None, :]
        order = inside[None, :] - inside[:, None]
        scores = scores.masked_fill((order < 0) | (order >= LONGEST), -torch.inf)
        first, last = divmod(int(scores.argmax()), len(inside))
        text = context[places[int(inside[first])][0] : places[int(inside[last])][1]]
        found.append({"example": example, "text": text, "score": float(scores[first, last]), "none": none})
    return found


def answers_of(spans: Sequence[dict[str, Any]], known: Sequence[list[str]]) -> tuple[list[str], list[list[str]]]:
    """(predicted, right) answers of every question, from those of its windows.

    Where some question of the data has no answer, "" is predicted where that is likelier in every window.
    """
    examples: dict[int, list[dict[str, Any]]] = {}
    right: dict[int, list[str]] = {}
    for span, answers in zip(spans, known, strict=True):
        examples.setdefault(span["example"], []).append(span)
        right[span["example"]] = answers
    may_lack = any(not answers for answers in right.values())
    predicted = {example: _best(windows, may_lack) for example, windows in examples.items()}
    return list(predicted.values()), [right[example] for example in predicted]


def _best(windows: list[dict[str, Any]], may_lack: bool) -> str:
    best = max(windows, key=lambda span: span["score"])
    none = min(span["none"] for span in windows)
    return "" if may_lack and none > best["score"] else best["text"]
