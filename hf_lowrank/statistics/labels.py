"""Whose labels the losses of samples are by: those of the data, or all that the model itself expects."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
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
    """The labels that the model itself expects: its own Fisher information, Martens (2014, section 5).

    That of a row of logits z is the expectation over all labels of its likelihood: diag(p) − p pᵀ for classes and
    tokens with p = softmax(z). No label has to be drawn for it: a loss zᵀ S s with S Sᵀ that matrix and s random signs
    has a squared gradient of that expectation, and a much smaller variance where the model is sure of itself and all
    but a few drawn labels would say nothing. Such square roots S of a loss's curvature are those of Dangel, Kunstner
    and Hennig (2020, BackPACK); here one random combination of their columns for each row, by the seed and the sample's
    number in the data alone. The curvature of a number's squared error is known, as is that of labels that may each
    apply. Of a model without a likelihood (hidden states, embeddings) it is the Gauss-Newton matrix of half the squared
    change of its output.

    Losses are scaled such that the expectation of the squared gradient is the curvature of the model's own mean loss:
    those of a sample's T tokens, independent as their signs are, are added up and divided by √T.

    Args:
        seed: of the random signs.
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
        """See `projected_losses`."""
        return projected_losses(predict(model, batch, self.readout), numbers, self.seed)

    together = alone

    def count(self, model: PreTrainedModel, batch: Batch, samples: int) -> int:
        """Losses are scaled already."""
        return samples

    def curvature(self, regression: bool, loss: float, labels: float) -> float:
        """Losses are scaled already."""
        return 1.0


def labels_of(labels: str | Labels, seed: int = 0) -> Labels:
    """The labels called "data" or "model", the latter with random signs by `seed`.

    Raises:
        LowRankError: there are no such labels.
    """
    if not isinstance(labels, str):
        return labels
    check_choice("labels", labels, LABELS)
    return DataLabels() if labels == "data" else ModelLabels(seed)


def projected_losses(predicted: Predicted, numbers: Sequence[int], seed: int) -> Tensor:
    """For each sample a scalar [samples] whose squared gradient is what the model says of it (see `ModelLabels`)."""
    counts = predicted.counts.tolist()
    rows = predicted.values.split(counts)
    if predicted.possible is not None:  # what is padding to a sample alone
        rows = tuple(values[:, kept] for values, kept in zip(rows, predicted.possible, strict=True))
    root = _ROOTS[predicted.kind]
    pairs = zip(rows, numbers, strict=True)
    losses = [(values * root(values.detach(), _signs(values, seed, number))).sum() for values, number in pairs]
    return torch.stack([loss / math.sqrt(max(count, 1)) for loss, count in zip(losses, counts, strict=True)])


def _signs(like: Tensor, seed: int, number: int) -> Tensor:
    """Random signs of a tensor's shape that depend on nothing but these two numbers: a bit for each."""
    drawn = np.random.default_rng([seed, number]).bytes(-(-like.numel() // 8))
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=like.numel())
    return torch.from_numpy(bits).to(like.device).to(like.dtype).mul_(2).sub_(1).view_as(like)


def _classes(logits: Tensor, signs: Tensor) -> Tensor:
    """S s for S = diag(√p) − p √pᵀ, [rows, classes]: S Sᵀ is diag(p) − p pᵀ."""
    shares = logits.softmax(dim=-1)
    scaled = shares.sqrt().mul_(signs)
    return scaled.sub_(shares.mul_(scaled.sum(dim=-1, keepdim=True)))


def _flags(logits: Tensor, signs: Tensor) -> Tensor:
    """Of labels that may each apply √(p (1 − p)) s, [rows, labels]: their mean loss, so over √labels."""
    return (logits.sigmoid() * (-logits).sigmoid() / logits.shape[1]).sqrt() * signs


def _numbers(values: Tensor, signs: Tensor) -> Tensor:
    """The gradient of a mean squared error with residuals ±1, over √2 as its curvature is 2, [rows, numbers]."""
    return signs * math.sqrt(2 / values.shape[1])


def _vector(values: Tensor, signs: Tensor) -> Tensor:
    """The signs themselves [rows, features]."""
    return signs


_ROOTS = {"classes": _classes, "flags": _flags, "numbers": _numbers, "vector": _vector}
