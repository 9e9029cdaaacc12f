"""A model and a batch of a task → what it says of every row, beside the truth, and the losses; by kind of task."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import IGNORED, SPAN, TARGETS, span_logits, unlabelled
from hf_lowrank.tasks import Task
from hf_lowrank.tasks.questions import best_spans
from hf_lowrank.tasks.sequences import written

Rows = dict[str, list[Any]]


@dataclass(frozen=True)
class Predictions:
    """What a model says of every row, beside the truth, and the loss of the row.

    `predicted` and `labels` hold a class, a number, a text or a list of classes for each row. For language models
    `predicted` holds the losses of its tokens, and `labels` nothing, or which masked tokens were told. Of answers in
    texts `predicted` holds what `best_spans` gives, and `labels` the right answers.
    """

    predicted: list[Any]
    labels: list[Any]
    losses: list[float]

    def take(self, rows: Iterable[int]) -> "Predictions":
        """Those of some rows."""
        rows = list(rows)
        return Predictions(*([column[row] for row in rows] for column in (self.predicted, self.labels, self.losses)))


def read_batch(model: Any, tokenizer: Any, task: Task, batch: dict[str, Any], rows: Rows) -> Predictions:
    """Run a model on a batch of encoded rows, and read what it says.

    Args:
        rows: the rows of the batch by column, with what is no input.

    Raises:
        LowRankError: a task of texts to write, and a model that writes none.
    """
    inputs = {key: value.to(model.device) for key, value in unlabelled(model, batch).items()}
    targets = {key: batch[key] for key in TARGETS if key in batch}
    outputs = model(**inputs)
    if task.kind == "question_answering":
        return _read_spans(outputs, inputs, targets, rows)
    if task.kind == "seq2seq" and task.metrics is not None:
        if not hasattr(model, "generate"):
            raise LowRankError(f"{task.name} is scored by what a model writes, and this {type(model).__name__} cannot")
        losses = _read_masked(outputs.logits.float().cpu(), targets["labels"]).losses
        return Predictions(written(model, tokenizer, inputs), rows["reference"], losses)
    return _READERS[task.kind](outputs.logits.float().cpu(), targets["labels"])


def _read_classes(logits: Tensor, labels: Tensor) -> Predictions:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return Predictions(logits.argmax(dim=-1).tolist(), labels.tolist(), losses.tolist())


def _read_numbers(logits: Tensor, labels: Tensor) -> Predictions:
    predicted = logits.squeeze(-1)
    return Predictions(predicted.tolist(), labels.tolist(), (predicted - labels).square().tolist())


def _read_tokens(logits: Tensor, labels: Tensor) -> Predictions:
    kept = labels != IGNORED
    predicted = [p[k].tolist() for p, k in zip(logits.argmax(dim=-1), kept, strict=True)]
    losses = [
        F.cross_entropy(z[k], y[k]).item() if k.any() else 0.0 for z, y, k in zip(logits, labels, kept, strict=True)
    ]
    return Predictions(predicted, [y[k].tolist() for y, k in zip(labels, kept, strict=True)], losses)


def _read_flags(logits: Tensor, labels: Tensor) -> Predictions:
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)
    chosen, right = ([row.nonzero()[:, 0].tolist() for row in flags] for flags in (logits > 0, labels > 0.5))
    return Predictions(chosen, right, losses.tolist())


def _read_spans(outputs: Any, inputs: dict[str, Any], targets: dict[str, Tensor], rows: Rows) -> Predictions:
    found: Any = span_logits(outputs, inputs)
    logits = found.cpu()
    places = torch.stack([targets[key] for key in SPAN], dim=1)
    losses = F.cross_entropy(logits.transpose(1, 2), places, reduction="none").mean(dim=1)
    return Predictions(best_spans(logits, rows), rows["known_answers"], losses.tolist())


def _read_text(logits: Tensor, labels: Tensor) -> Predictions:
    return _read_masked(logits[:, :-1], labels[:, 1:])


def _read_masked(logits: Tensor, labels: Tensor) -> Predictions:
    kept = labels != IGNORED
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    tokens = [row[k].double().tolist() for row, k in zip(flat.view_as(kept), kept, strict=True)]
    return Predictions(tokens, [None] * len(tokens), [math.fsum(row) / max(len(row), 1) for row in tokens])


def _read_masks(logits: Tensor, labels: Tensor) -> Predictions:
    found, kept = _read_masked(logits, labels), labels != IGNORED
    hits = [(p[k] == y[k]).tolist() for p, y, k in zip(logits.argmax(dim=-1), labels, kept, strict=True)]
    return Predictions(found.predicted, hits, found.losses)


_READERS = {
    "classification": _read_classes,
    "regression": _read_numbers,
    "token_classification": _read_tokens,
    "causal_lm": _read_text,
    "masked_lm": _read_masks,
    "seq2seq": _read_masked,
    "multi_label": _read_flags,
    "image_classification": _read_classes,
}
