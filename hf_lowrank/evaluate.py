"""A model's score on a task's validation data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.progress import bar
from hf_lowrank.tasks import IGNORED, Task, collator, label_ids_of, load_validation


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data_dir: Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, float]:
    """The figures of `task.metrics` over all its validation rows, and `score`, the one that counts.

    In percent, perplexity apart. A task with several validation splits scores their mean. `degenerate` is 1 where all
    predictions are the same, and 0 otherwise. `model` is left in the mode it had.

    Raises:
        LowRankError: the data cannot be read or lack what the task needs.
    """
    validation = load_validation(task, data_dir, tokenizer, model.config)
    return evaluate_splits(model, tokenizer, task, validation, batch_size, progress)


def evaluate_splits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    validation: Sequence[Dataset],
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, float]:
    """As `evaluate`, over splits that are encoded already (`load_validation`)."""
    results = [evaluate_rows(model, tokenizer, task, rows, batch_size, progress) for rows in validation]
    return {key: float(np.mean([result[key] for result in results])) for key in results[0]}


def evaluate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, float]:
    """As `evaluate`, over rows that are encoded already."""
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator(task, tokenizer))
    with bar(f"evaluating {task.name}", len(rows), "samples", progress) as shown:
        outputs = _predictions(model, loader, task, shown)
    result = _perplexity(outputs) if task.kind == "causal_lm" else _score(outputs, task, model)
    return {"score": result[task.score], **result}


@torch.inference_mode()
def _predictions(model: PreTrainedModel, loader: DataLoader, task: Task, shown: Any) -> list[tuple[Any, Any]]:
    """(predictions, labels) of every batch; for language models (losses [tokens], None)."""
    training = model.training
    model.eval()
    outputs = []
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits.float().cpu()
        outputs.append(_READERS[task.kind](logits, labels))
        shown.update(len(labels))
    model.train(training)
    return outputs


def _read_tokens(logits: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
    predicted = logits.argmax(dim=-1)
    kept = labels != IGNORED
    return [p[k].tolist() for p, k in zip(predicted, kept, strict=True)], [
        y[k].tolist() for y, k in zip(labels, kept, strict=True)
    ]


def _read_text(logits: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses[labels[:, 1:].flatten() != IGNORED].double().tolist(), []


_READERS = {
    "classification": lambda logits, labels: (logits.argmax(dim=-1).tolist(), labels.tolist()),
    "regression": lambda logits, labels: (logits.squeeze(-1).tolist(), labels.tolist()),
    "token_classification": _read_tokens,
    "causal_lm": _read_text,
}


def _score(outputs: list[tuple[Any, Any]], task: Task, model: PreTrainedModel) -> dict[str, float]:
    predictions = [p for batch, _ in outputs for p in batch]
    labels = [y for _, batch in outputs for y in batch]
    if task.label_names:  # from the model's labels back to those of the data
        names = dict(zip(label_ids_of(task, model.config), _meanings(task), strict=True))
        predictions, labels = _renamed(predictions, names), _renamed(labels, names)
    distinct = {str(prediction) for prediction in predictions}
    assert task.metrics is not None
    figures = {key: float(value) for key, value in task.metrics(predictions, labels).items()}
    return {**figures, "degenerate": float(len(distinct) == 1)}


def _meanings(task: Task) -> Sequence[Any]:
    return task.label_names if task.kind == "token_classification" else range(len(task.label_names))


def _renamed(labels: list[Any], names: dict[int, Any]) -> list[Any]:
    return [_renamed(label, names) if isinstance(label, list) else names[label] for label in labels]


def _perplexity(outputs: list[tuple[Any, Any]]) -> dict[str, float]:
    losses = [loss for batch, _ in outputs for loss in batch]
    mean = math.fsum(losses) / len(losses)
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "loss": mean, "tokens": float(len(losses))}
