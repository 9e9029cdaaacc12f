"""A model's score on a task's validation data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import bar
from hf_lowrank.tasks import Task, collator, described, label_ids_of, load_validation
from hf_lowrank.tasks.questions import answers_of
from hf_lowrank.tasks.windows import rows_at_once
from hf_lowrank.training.readers import Predictions, read_batch


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
    return evaluate_described(model, tokenizer, task, data_dir, batch_size, progress)[0]


def evaluate_described(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data_dir: Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The figures of `evaluate`, and the validation data that they were measured on (`tasks.described`)."""
    validation = load_validation(task, data_dir, tokenizer, model.config)
    figures = evaluate_splits(model, tokenizer, task, validation, batch_size, progress)
    return figures, described(validation, task, data_dir)


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
    return score_predictions(predict_rows(model, tokenizer, task, rows, batch_size, progress), task, model.config)


def score_and_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    validation: Sequence[Dataset],
    progress: bool = True,
) -> dict[str, float]:
    """The `score`, and the mean `loss` of the rows, of splits that are encoded already; of several splits the means."""
    outputs = [predict_rows(model, tokenizer, task, rows, progress=progress) for rows in validation]
    scores = [score_predictions(found, task, model.config)["score"] for found in outputs]
    losses = [sum(found.losses) / len(found.losses) for found in outputs]
    return {"score": sum(scores) / len(scores), "loss": sum(losses) / len(losses)}


def score_predictions(outputs: Predictions, task: Task, config: PreTrainedConfig) -> dict[str, float]:
    """The figures of `task.metrics` and the `score`, for the model with this `config`."""
    result = _perplexity(outputs) if task.score == "perplexity" else _score(outputs, task, config)
    return {"score": result[task.score], **result}


@torch.inference_mode()
def predict_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset,
    batch_size: int = 32,
    progress: bool = True,
) -> Predictions:
    """Run the model over encoded rows, in their order. It is left in the mode it had.

    Raises:
        LowRankError: the task has no labels.
    """
    if not task.has_labels:
        raise LowRankError(f"{task.name} have no labels to score by; compare with the dense model instead")
    at_once = rows_at_once(rows, task, batch_size)
    loader = DataLoader(rows, batch_size=at_once, collate_fn=collator(task, tokenizer))
    training = model.training
    model.eval()
    outputs = Predictions([], [], [])
    with bar(f"evaluating {task.name}", len(rows), "samples", progress) as shown:
        for number, batch in enumerate(loader):
            own = rows[number * at_once : (number + 1) * at_once]
            read = read_batch(model, tokenizer, task, batch, own)
            outputs.predicted.extend(read.predicted)
            outputs.labels.extend(read.labels)
            outputs.losses.extend(read.losses)
            shown.update(len(read.losses))
    model.train(training)
    return outputs


def _score(outputs: Predictions, task: Task, config: PreTrainedConfig) -> dict[str, float]:
    predictions, labels = outputs.predicted, outputs.labels
    if task.kind == "question_answering":
        predictions, labels = answers_of(predictions, labels)
    if task.label_names:  # from the model's labels back to those of the data
        names = dict(zip(label_ids_of(task, config), _meanings(task), strict=True))
        predictions, labels = _renamed(predictions, names), _renamed(labels, names)
    distinct = {str(prediction) for prediction in predictions}
    assert task.metrics is not None
    figures = {key: float(value) for key, value in task.metrics(predictions, labels).items()}
    return {**figures, "degenerate": float(len(distinct) == 1)}


def _meanings(task: Task) -> Sequence[Any]:
    return task.label_names if task.kind == "token_classification" else range(len(task.label_names))


def _renamed(labels: list[Any], names: dict[int, Any]) -> list[Any]:
    return [_renamed(label, names) if isinstance(label, list) else names[label] for label in labels]


def _perplexity(outputs: Predictions) -> dict[str, float]:
    losses = [loss for row in outputs.predicted for loss in row]
    mean = math.fsum(losses) / len(losses)
    told = [right for row in outputs.labels for right in row or ()]
    accuracy = {"accuracy": 100 * sum(told) / len(told)} if told else {}
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": perplexity, "loss": mean, "tokens": float(len(losses)), **accuracy}
