"""Pairs of texts and a model that embeds texts → how well its similarities rank them, and which neighbours it keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.predictions import Readout
from hf_lowrank.tasks import Task
from hf_lowrank.tasks.data import load_split
from hf_lowrank.tasks.metrics import correlation

NEIGHBOURS, TEXTS = 10, 2000


@torch.inference_mode()
def embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    readout: Readout,
    texts: Sequence[str],
    max_length: int = 128,
    batch_size: int = 32,
    progress: bool = True,
) -> np.ndarray[Any, Any]:
    """The embeddings of texts [texts, features], at unit length and in their order. The model keeps its mode."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    found: list[Any] = [None] * len(texts)
    training = model.training
    model.eval()
    with bar("embedding", len(texts), "texts", progress) as shown:
        for chosen in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
            given = [texts[number] for number in chosen]
            batch = tokenizer(given, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
            inputs: Any = batch.to(model.device)
            rows = readout(model(**inputs), inputs).float().cpu().numpy()
            for number, row in zip(chosen, rows, strict=True):
                found[number] = row / max(float(np.linalg.norm(row)), 1e-12)
            shown.update(len(chosen))
    model.train(training)
    return np.stack(found)


def evaluate_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    readout: Readout,
    data_dir: Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, float]:
    """Correlations of the cosines of a task's pairs with their labels, in percent; `score` is Spearman's.

    A task with several validation splits scores their mean.

    Raises:
        LowRankError: the data cannot be read, or the task has no labels.
    """
    if not task.is_scored:
        raise LowRankError(f"{task.name} have no labels to score by; compare with the dense model instead")
    splits = [load_split(task, split, data_dir) for split in task.validation]
    results = []
    for rows in splits:
        texts = [text for column in task.text for text in rows[column]]
        found = embeddings(model, tokenizer, readout, texts, task.max_length, batch_size, progress)
        first, second = np.split(found, 2)
        results.append(ranked(first, second, rows[task.label]))
    return {key: float(np.mean([result[key] for result in results])) for key in results[0]}


def agreement(
    dense: PreTrainedModel,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    readout: Readout,
    data_dir: Path | None = None,
) -> float:
    """`shared_neighbours` of two models among the first texts of a task's validation data, at most `TEXTS` of them."""
    rows = load_split(task, task.validation[0], data_dir)
    texts = list(dict.fromkeys(text for column in task.text for text in rows[column]))[:TEXTS]
    by_dense, by_other = (embeddings(model, tokenizer, readout, texts, task.max_length) for model in (dense, other))
    return shared_neighbours(by_dense, by_other)


def ranked(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any], labels: Sequence[float]) -> dict[str, float]:
    """Correlations of the cosines of pairs of embeddings with their labels, in percent; `score` is Spearman's."""
    figures = correlation((first * second).sum(axis=1), np.asarray(labels))
    return {"score": figures["spearman"], "spearman": figures["spearman"], "pearson": figures["pearson"]}


def shared_neighbours(dense: np.ndarray[Any, Any], other: np.ndarray[Any, Any], count: int = NEIGHBOURS) -> float:
    """The share, in percent, of the texts nearest to a text by one model's embeddings that are so by another's."""
    count = min(count, len(dense) - 1)
    near = [_neighbours(vectors, count) for vectors in (dense, other)]
    shared = [len(set(one) & set(two)) for one, two in zip(*near, strict=True)]
    return 100 * float(np.mean(shared)) / max(count, 1)


def _neighbours(vectors: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return np.argpartition(-similar, count - 1, axis=1)[:, :count]
