"""A model, the dense one it was made from, and a task's rows → how far its predictions are from the dense one's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.predictions import Predicted, Readout, divergences, predict
from hf_lowrank.tasks import Task, collator
from hf_lowrank.tasks.windows import rows_at_once

# A dense model's predictions are kept up to so many bytes, and found again beyond.
KEPT_BYTES = 2**28

# What the divergence of a kind of predictions is called.
KL, CHANGE = "KL to dense (nats)", "half squared change (nats at unit noise)"
MEASURES = {"classes": KL, "flags": KL, "numbers": CHANGE, "vector": CHANGE}


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from another's, as a mean over all of them.

    Args:
        measure: a value of `MEASURES`.
        mean: in nats: KL(dense ‖ model) of classes, tokens or labels that may each apply; of numbers and embeddings
            half the squared change, which is the KL of normal distributions of variance 1.
        standard_error: of the mean, samples being independent and the tokens of one not.
        count: of predictions: samples, or tokens.
        cosine: of embeddings and hidden states, the mean cosine with the dense model's.
    """

    measure: str
    mean: float
    standard_error: float
    count: int
    cosine: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Divergence":
        """What `to_dict` was called on; other facts beside it are left out."""
        return cls(**{known.name: record[known.name] for known in fields(cls) if known.name in record})

    def __str__(self) -> str:
        cosine = "" if self.cosine is None else f", cosine {self.cosine:.4f}"
        return f"{self.measure} {self.mean:.4g} ± {self.standard_error:.2g}{cosine}"


class Reference:
    """A dense model and the rows it is compared on; its predictions are kept while they fit into `KEPT_BYTES`.

    Args:
        dense: left in the mode it has.
        validation: the rows of every split, encoded (`load_validation`); labels only say which tokens count.
        readout: see `predict`.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        validation: Sequence[Dataset],
        batch_size: int = 32,
        readout: Readout | None = None,
    ) -> None:
        self.dense, self.task, self.validation, self.readout = dense, task, validation, readout
        joined = collator(task, tokenizer)
        sizes = [rows_at_once(rows, task, batch_size) for rows in validation]
        self.loaders = [DataLoader(rows, size, collate_fn=joined) for rows, size in zip(validation, sizes, strict=True)]
        self.kept: dict[int, Predicted] = {}
        self.room = KEPT_BYTES

    def divergence(self, model: PreTrainedModel, progress: bool = True) -> Divergence:
        """That of a model from the dense one; it is left in the mode it had.

        Raises:
            LowRankError: it predicts something else than the dense one.
        """
        sums, counts, cosines, kind = [], [], 0.0, ""
        with bar("comparing with dense", sum(map(len, self.validation)), "samples", progress) as shown:
            for number, batch in enumerate(self._batches()):
                dense, found = self._dense(number, batch), _predicted(model, batch, self.readout)
                rows = divergences(dense, found).double().cpu()
                kind, samples = dense.kind, dense.sample.cpu()
                sums.append(torch.zeros(dense.samples, dtype=torch.float64).index_add_(0, samples, rows))
                counts.append(dense.counts.double().cpu())
                cosines += float(torch.cosine_similarity(dense.values, found.values).double().sum())
                shown.update(dense.samples)
        mean, error, count = _ratio(torch.cat(sums), torch.cat(counts))
        return Divergence(MEASURES[kind], mean, error, count, cosines / count if kind == "vector" else None)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        return (batch for loader in self.loaders for batch in loader)

    def _dense(self, number: int, batch: dict[str, Tensor]) -> Predicted:
        if number in self.kept:
            return self.kept[number]
        predicted = _predicted(self.dense, batch, self.readout)
        size = predicted.values.numel() * predicted.values.element_size()
        if size <= self.room:
            self.room -= size
            self.kept[number] = predicted
        return predicted


@torch.inference_mode()
def _predicted(model: PreTrainedModel, batch: dict[str, Tensor], readout: Readout | None) -> Predicted:
    training = model.training
    try:
        return predict(model.eval(), {key: value.to(model.device) for key, value in batch.items()}, readout)
    finally:
        model.train(training)


def _ratio(sums: Tensor, counts: Tensor) -> tuple[float, float, int]:
    """Σ sums / Σ counts over samples, its standard error by linearisation, and Σ counts."""
    total, samples = float(counts.sum()), len(counts)
    mean = float(sums.sum()) / total
    spread = float((sums - mean * counts).square().sum()) * samples / max(samples - 1, 1)
    return mean, math.sqrt(spread) / total, int(total)
