"""Whose labels the losses of samples are by: those of the data, or drawn from what the model itself predicts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.jobs.settings import check_choice, check_seed
from hf_lowrank.model.predictions import Predicted, Readout, counted, predict
from hf_lowrank.statistics.batches import Batch
from hf_lowrank.statistics.losses import (
    curvature_per_fisher,
    label_count,
    labelled,
    own_loss,
    sample_losses,
)
from hf_lowrank.statistics.names import LABELS

# From a model, a batch, and the numbers of its samples in the order of all data, to the samples' losses.
Losses = Callable[[PreTrainedModel, Batch, Sequence[int]], Tensor]


class Labels(Protocol):
    """How the losses of samples are found."""

    @property
    def origin(self) -> str:
        """Whose labels they are, in a word."""

    def known(self, model: PreTrainedModel, batch: Batch) -> list[int]:
        """The samples of a batch that have a loss at all."""

    def alone(self, model: PreTrainedModel, batch: Batch, numbers: Sequence[int]) -> Tensor:
        """The loss of a batch of one sample [1]."""

    def together(self, model: PreTrainedModel, batch: Batch, numbers: Sequence[int]) -> Tensor:
        """The losses of all samples of a batch [batch], if they can be told apart."""

    def count(self, model: PreTrainedModel, batch: Batch, samples: int) -> int:
        """How many labels the losses of a batch are means over."""

    def curvature(self, regression: bool, loss: float, labels: float) -> float:
        """What squared gradients of losses are multiplied by to be the curvature of the model's mean loss."""


@dataclass(frozen=True)
class DataLabels:
    """The labels of the data: the empirical Fisher information, as the papers of FWSVD and TFWSVD have it."""

    origin = "data"

    def known(self, model: PreTrainedModel, batch: Batch) -> list[int]:
        """See `labelled`."""
        return labelled(model, batch)

    def alone(self, model: PreTrainedModel, batch: Batch, numbers: Sequence[int]) -> Tensor:
        """See `own_loss`."""
        return own_loss(model, batch)

    def together(self, model: PreTrainedModel, batch: Batch, numbers: Sequence[int]) -> Tensor:
        """See `sample_losses`."""
        return sample_losses(model, batch)

    def count(self, model: PreTrainedModel, batch: Batch, samples: int) -> int:
        """See `label_count`."""
        return label_count(model, batch, samples)

    def curvature(self, regression: bool, loss: float, labels: float) -> float:
        """See `curvature_per_fisher`."""
        return curvature_per_fisher(regression, loss, labels)


@dataclass(frozen=True)
class ModelLabels:
    """Labels drawn from the model's own prediction: its own Fisher information, Martens (2014, section 5).

    Classes and tokens are drawn from the softmax, labels that may each apply one by one, numbers are the output plus or
    minus 1. One draw for each sample, by the seed and the sample's number in the data alone. Of a model without a
    likelihood (hidden states, embeddings) it is the Gauss-Newton matrix of half the squared change of its output:
    the loss is the output's product with random signs, whose squared gradient has that expectation.

    Losses are scaled such that the expectation of the squared gradient is the curvature of the model's own mean loss:
    those of a sample's T tokens, independent as they are drawn, are added up and divided by √T.

    Args:
        seed: of the draws.
        readout: what counts of an output without a likelihood, such as `mean_pooled`; None for all of it.
    """

    seed: int = 0
    readout: Readout | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def origin(self) -> str:
        """ "model", and the name of the readout if there is one."""
        return "model" if self.readout is None else f"model, {getattr(self.readout, '__name__', 'readout')}"

    def known(self, model: PreTrainedModel, batch: Batch) -> list[int]:
        """See `counted`."""
        return counted(model, batch)

    def alone(self, model: PreTrainedModel, batch: Batch, numbers: Sequence[int]) -> Tensor:
        """The loss of each sample by its drawn labels."""
        return drawn_losses(predict(model, batch, self.readout), numbers, self.seed)

    together = alone

    def count(self, model: PreTrainedModel, batch: Batch, samples: int) -> int:
        """Losses are scaled already."""
        return samples

    def curvature(self, regression: bool, loss: float, labels: float) -> float:
        """Losses are scaled already."""
        return 1.0


def labels_of(labels: str | Labels, seed: int = 0) -> Labels:
    """The labels called "data" or "model", the latter drawn by `seed`.

    Raises:
        LowRankError: there are no such labels.
    """
    if not isinstance(labels, str):
        return labels
    check_choice("labels", labels, LABELS)
    return DataLabels() if labels == "data" else ModelLabels(seed)


def drawn_losses(predicted: Predicted, numbers: Sequence[int], seed: int) -> Tensor:
    """The loss of each sample [samples] by labels drawn from what is predicted of it (see `ModelLabels`)."""
    counts = predicted.counts.tolist()
    rows = predicted.values.split(counts)
    draw = _DRAWS[predicted.kind]
    losses = [draw(values, _generator(seed, number)) for values, number in zip(rows, numbers, strict=True)]
    return torch.stack([loss.sum() / math.sqrt(max(len(loss), 1)) for loss in losses])


def _generator(seed: int, number: int) -> torch.Generator:
    """Random numbers that depend on nothing but these two."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def _classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """−log p(y) of drawn classes y, for logits [rows, classes]."""
    shares = logits.detach().softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    at = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    labels = torch.searchsorted(shares, at * shares[:, -1:], right=True)[:, 0].clamp_max(logits.shape[1] - 1)
    return F.cross_entropy(logits, labels, reduction="none")


def _flags(logits: Tensor, generator: torch.Generator) -> Tensor:
    """−log p(y) of drawn yes and no, for logits [rows, labels]: of their mean, so over √labels."""
    at = torch.rand(logits.shape, generator=generator).to(logits.device)
    labels = (at < logits.detach().sigmoid()).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return losses.sum(dim=1) / math.sqrt(logits.shape[1])


def _numbers(values: Tensor, generator: torch.Generator) -> Tensor:
    """What has the gradient of a mean squared error with residuals ±1, over √2 as its curvature is 2, [rows]."""
    return _vector(values, generator) * math.sqrt(2 / values.shape[1])


def _vector(values: Tensor, generator: torch.Generator) -> Tensor:
    """The product of each row [rows, k] with random signs."""
    signs: Any = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return (values * signs.to(values)).sum(dim=1)


_DRAWS = {"classes": _classes, "flags": _flags, "numbers": _numbers, "vector": _vector}
