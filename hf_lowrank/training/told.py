"""A teacher and the batches of a training, which come again → what it says of each, found once while there is room."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.jobs.digests import digest_of
from hf_lowrank.model.predictions import IGNORED, Predicted, Readout, divergences, read, unlabelled

# What a teacher says is kept up to so many bytes, and found again beyond: 5,000 sentences of MiniLM's hidden states.
KEPT_BYTES = 2**30

HIDDEN = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")  # of outputs: after every block

Batch = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """What a model says of a batch.

    Args:
        predicted: what it predicts.
        hidden: the hidden states after every block [samples, tokens, width]; none where they were not asked for.
        written: how many of these, the last ones, are of a decoder behind an encoder, which reads other tokens.
    """

    predicted: Predicted
    hidden: tuple[Tensor, ...]
    written: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, outputs: Any, batch: Batch, readout: Readout | None) -> "Told":
        """What is in the outputs of a model for a batch."""
        states = [(getattr(outputs, kind, None) or ())[1:] for kind in HIDDEN]
        return cls(read(model, outputs, batch, readout), tuple(chain(*states)), len(states[-1]))

    @property
    def bytes(self) -> int:
        """Of memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.predicted.values, *self.hidden))

    def divergence(self, other: "Told") -> Tensor:
        """How far another model's predictions are from these, the mean of every sample's in nats [samples]."""
        rows = divergences(self.predicted, other.predicted)
        sums = rows.new_zeros(self.predicted.samples).index_add(0, other.predicted.sample, rows)
        return sums / other.predicted.counts.clamp_min(1)

    def hidden_errors(self, other: "Told", batch: Batch, metrics: Sequence[Tensor]) -> Tensor:
        """(h − h')ᵀ G (h − h') / 2 of every sample, over tokens that are no padding, the mean of all blocks [samples].

        Args:
            metrics: G of every block, [width, width] or a number (see `hidden_metrics`).
        """
        errors = []
        for own, others, mask, metric in zip(self.hidden, other.hidden, self.masks(batch), metrics, strict=True):
            error = others.float() - own.float()
            error = error if mask is None else error * mask[..., None].to(error)
            weighed = error @ metric if metric.ndim else metric * error
            errors.append((weighed * error).flatten(1).sum(1) / 2)
        return torch.stack(errors).mean(0)

    def masks(self, batch: Batch) -> list[Tensor | None]:
        """Of the hidden states after every block, which tokens are no padding [samples, tokens]; None if all are."""
        first = len(self.hidden) - self.written
        return [_mask(state, batch, number >= first) for number, state in enumerate(self.hidden)]


class Teacher:
    """A model whose predictions of a batch, and hidden states if wanted, are kept while they fit into `KEPT_BYTES`.

    Args:
        model: in evaluation mode; it is not changed.
        hidden: whether hidden states are wanted.
        readout: see `predict`.
    """

    def __init__(self, model: PreTrainedModel, hidden: bool, readout: Readout | None) -> None:
        self.model, self.hidden, self.readout = model, hidden, readout
        self.kept: dict[str, Told] = {}
        self.room = KEPT_BYTES

    def inputs(self, batch: Batch) -> Batch:
        """What both models are called with."""
        return unlabelled(self.model, batch) | {"output_hidden_states": self.hidden}

    def asked(self, batch: Batch) -> Told:
        """What it says of a batch now."""
        return Told.of(self.model, self.model(**self.inputs(batch)), batch, self.readout)

    def says(self, batch: Batch) -> Told:
        """What it says of a batch."""
        key = digest_of(value for value in batch.values() if isinstance(value, Tensor))
        if key in self.kept:
            return self.kept[key]
        with torch.no_grad():
            told = self.asked(batch)
        if told.bytes <= self.room:
            self.room -= told.bytes
            self.kept[key] = told
        return told


def _mask(state: Tensor, batch: Batch, written: bool) -> Tensor | None:
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if written and isinstance(labels, Tensor) and labels.shape == state.shape[:2]:
        return labels != IGNORED
    return mask if isinstance(mask, Tensor) and mask.shape == state.shape[:2] else None
