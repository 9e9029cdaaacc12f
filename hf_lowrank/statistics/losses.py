"""The loss of every sample of a batch, as the model itself would compute it for that sample alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import (
    IGNORED,
    SPAN,
    UNKNOWN,
    UNKNOWN_NUMBER,
    in_own_dtype,
    is_causal,
    span_logits,
    unlabelled,
)
from hf_lowrank.statistics.batches import Batch, batch_size

SampleLosses = Callable[[PreTrainedModel, Batch], Tensor]


class NotSeparable(Exception):
    """The samples of a batch cannot be told apart in this model, so that a batch must be a single sample."""


def own_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's own loss for a batch of one sample [1]; of marked answers without padding among the answers.

    Raises:
        LowRankError: the model returned no loss, because the batch has no labels for it.
    """
    outputs = model(**in_own_dtype(model, batch))
    loss = getattr(outputs, "loss", None)
    if loss is not None and all(key in batch for key in SPAN) and (logits := span_logits(outputs, batch)) is not None:
        return _span_losses(logits, batch)
    if loss is None:
        raise LowRankError(
            f"{type(model).__name__} returned no loss for a batch of {', '.join(batch)}: "
            "the data lack the labels that it needs"
        )
    return loss.reshape(1)


def sample_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Each sample's own mean loss [batch], for classification of sequences and tokens, language models and answers.

    `compute_statistics` checks the answer against `own_loss` before relying on it.

    Raises:
        NotSeparable: the model or its labels are of another kind.
    """
    labels, spans = batch.get("labels"), all(key in batch for key in SPAN)
    writes = isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
    if not (spans or isinstance(labels, Tensor)) or (getattr(model.config, "is_encoder_decoder", False) and not writes):
        raise NotSeparable
    outputs = model(**unlabelled(model, batch))
    if spans and (marked := span_logits(outputs, batch)) is not None:
        return _span_losses(marked, batch)
    logits = getattr(outputs, "logits", None)
    if not isinstance(labels, Tensor):
        raise NotSeparable
    if isinstance(logits, Tensor) and logits.ndim == 3 and labels.shape == logits.shape[:2]:
        return _token_losses(logits[:, :-1], labels[:, 1:]) if is_causal(model) else _token_losses(logits, labels)
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(labels):
        return _sequence_losses(logits, labels, getattr(model.config, "problem_type", None))
    raise NotSeparable


def labelled(model: PreTrainedModel, batch: Batch) -> list[int]:
    """The samples of a batch that have a label at all: a text of one token has none for a causal language model.

    Raises:
        LowRankError: their labels are not known (see `UNKNOWN`).
    """
    labels = batch.get("labels")
    unknown = UNKNOWN_NUMBER if isinstance(labels, Tensor) and labels.is_floating_point() else UNKNOWN
    if isinstance(labels, Tensor) and bool((labels == unknown).any()):
        raise LowRankError("these texts have no labels; take those of the model")
    if not isinstance(labels, Tensor) or labels.ndim == 0 or labels.is_floating_point():
        return list(range(batch_size(batch)))
    known = (labels[:, 1:] if is_causal(model) and labels.ndim > 1 else labels) != IGNORED
    return known.flatten(1).any(dim=1).nonzero()[:, 0].tolist() if labels.ndim > 1 else known.nonzero()[:, 0].tolist()


def label_count(model: PreTrainedModel, batch: Batch, samples: int) -> int:
    """How many labels the losses of a batch are means over: its labelled tokens, its numbers, or one for each sample.

    Several numbers for a sample are a vector to predict, or a yes or no for each of its labels. An answer has two
    labels, where it begins and where it ends.
    """
    if all(key in batch for key in SPAN):
        return 2 * samples
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return samples
    if labels.is_floating_point():
        return labels.numel() if labels.shape[1] == getattr(model.config, "num_labels", None) else samples
    return int(((labels[:, 1:] if is_causal(model) else labels) != IGNORED).sum())


def is_regression(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether the loss of a batch is a squared error."""
    labels, classes = batch.get("labels"), getattr(model.config, "num_labels", None)
    number = isinstance(labels, Tensor) and labels.is_floating_point()
    problem = getattr(model.config, "problem_type", None)
    return number and (problem == "regression" or (problem is None and classes == 1))


def curvature_per_fisher(regression: bool, loss: float, labels: float) -> float:
    """What the Fisher information of samples' losses is multiplied by to be the curvature of the mean loss.

    They are equal for a log likelihood with one label for each sample. The mean over a sample's T labels (tokens,
    numbers, classes that may each apply) has the curvature of one of them, but T times less squared gradient, labels
    being nearly independent: `labels` is the mean T. A squared error with residuals r has curvature 2 JJᵀ and squared
    gradient 4 r² JJᵀ: the factor is T / (2 E r²), `loss` being E r².
    """
    if regression:
        return labels / (2 * loss) if loss > 0 else 1.0
    return labels


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, the mean over each sample's labelled tokens: logits [batch, tokens, classes] → [batch]."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp_min(1)


def _span_losses(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross entropy of where an answer begins and ends: logits [batch, 2, tokens] → [batch].

    As in transformers' own models, a place behind the last token adds nothing.
    """
    tokens = logits.shape[-1]
    places = torch.stack([batch[key].view(-1) for key in SPAN], dim=1).clamp(0, tokens).to(logits.device)
    losses = F.cross_entropy(logits.transpose(1, 2), places, ignore_index=tokens, reduction="none")
    return losses.mean(dim=1)


def _sequence_losses(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The three losses of sequence classification: logits [batch, classes] → [batch]."""
    if problem_type is None:
        integer = not labels.is_floating_point()
        problem_type = (
            "regression"
            if logits.shape[1] == 1
            else "single_label_classification"
            if integer
            else "multi_label_classification"
        )
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits.float(), labels.view(-1), reduction="none")
    labels = labels.reshape(logits.shape).to(torch.float32)
    if problem_type == "regression":
        return F.mse_loss(logits.float(), labels, reduction="none").mean(dim=1)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").mean(dim=1)
    raise NotSeparable
