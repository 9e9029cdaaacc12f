"""A model and a batch → what it predicts of every sample, without labels; two models' → how far they are apart."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_lowrank.errors import LowRankError

IGNORED, UNKNOWN, UNKNOWN_NUMBER = -100, -1, -math.inf  # labels of tokens that do not count; of what has none

# What of a batch a model is told, and is to say by itself: labels, or where an answer begins and ends.
SPAN = ("start_positions", "end_positions")
TARGETS = ("labels", *SPAN)

# From a model's outputs and its batch to what counts of them [batch, features], such as pooled embeddings.
Readout = Callable[[Any, dict[str, Any]], Tensor]

PROBLEMS = {
    "single_label_classification": "classes",
    "multi_label_classification": "flags",
    "regression": "numbers",
}


@dataclass(frozen=True)
class Predicted:
    """What a model predicts of a batch, a row for each thing that it predicts.

    Args:
        kind: "classes" (values are the logits of classes), "flags" (the logits of labels that may each apply),
            "numbers" (each the mean of a normal distribution of variance 1), or "vector" (an embedding, no likelihood).
        values: [rows, k] in float32.
        sample: of which sample of the batch each row is [rows], in rising order.
        samples: how many samples the batch has.
        possible: which of the k a sample's rows can be at all [samples, k], where that is not all of them.
    """

    kind: str
    values: Tensor
    sample: Tensor
    samples: int
    possible: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """How many rows each sample has [samples]."""
        return self.sample.bincount(minlength=self.samples)


def predict(model: nn.Module, batch: dict[str, Any], readout: Readout | None = None) -> Predicted:
    """Run a model on a batch. Labels are not read; where there are some, -100 says which tokens do not count.

    Of token classifiers and language models a row is a token that counts, by default one that is no padding; a causal
    language model's last token predicts nothing. Of a model without a head it is the last hidden state of a token. Of
    a model that marks an answer in a text two rows are a sample: where it begins, and where it ends.

    Args:
        readout: what to take instead of all that: from outputs and batch to [batch, features].

    Raises:
        LowRankError: the model's output is of another kind.
    """
    return read(model, model(**unlabelled(model, batch)), batch, readout)


def read(model: nn.Module, outputs: Any, batch: dict[str, Any], readout: Readout | None = None) -> Predicted:
    """As `predict`, from the outputs of a model that was run on the batch.

    Raises:
        LowRankError: as `predict`.
    """
    if readout is not None:
        return _of_samples("vector", readout(outputs, batch).float().flatten(1))
    logits, hidden = getattr(outputs, "logits", None), getattr(outputs, "last_hidden_state", None)
    if isinstance(logits, Tensor) and logits.ndim == 3:
        return _of_tokens("classes", logits, batch, is_causal(model))
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return _of_samples(_kind(model, logits, batch.get("labels")), logits.float())
    if (spans := span_logits(outputs, batch)) is not None:
        return _of_spans(spans)
    if logits is None and isinstance(hidden, Tensor) and hidden.ndim == 3:
        return _of_tokens("vector", hidden, batch)
    raise LowRankError(
        f"{type(model).__name__} gives no classes, numbers, tokens or hidden states that are known how to be compared; "
        "give labels of data, or a readout, a function of outputs and batch to what counts"
    )


def counted(model: nn.Module, batch: dict[str, Any]) -> list[int]:
    """The samples of a batch of which a model predicts anything: a causal language model nothing of a single token."""
    labels: Any = batch.get("labels")
    mask: Any = batch.get("attention_mask")
    tokens: Any = labels if _are_classes(labels) else mask
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        return list(range(_size(batch)))
    return _counts(batch, tokens.shape, tokens.device, is_causal(model)).any(dim=1).nonzero()[:, 0].tolist()


def divergences(reference: Predicted, other: Predicted) -> Tensor:
    """How far other predictions are from a reference, in nats, by row [rows].

    The Kullback-Leibler divergence of what is predicted; of numbers at unit variance, and of vectors as if they were
    such numbers, half the squared difference.

    Raises:
        LowRankError: they are not of the same things.
    """
    if reference.kind != other.kind or reference.values.shape != other.values.shape:
        raise LowRankError(
            f"the models predict different things: {reference.values.shape[1]} {reference.kind} and "
            f"{other.values.shape[1]} {other.kind}; compare a model with the one it was made from"
        )
    return _DIVERGENCES[reference.kind](reference.values, other.values.to(reference.values.device))


def is_causal(model: nn.Module) -> bool:
    """Whether a model's logits at a token are of the next one."""
    return model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # a low-rank class has its base's name


def mean_pooled(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """A readout: the mean of the last hidden states of a text's tokens [batch, hidden], at unit length.

    Squared differences of such embeddings are 2 − 2 cos.
    """
    hidden = outputs.last_hidden_state.float()
    mask = batch["attention_mask"][..., None].to(hidden)
    return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1), dim=-1)


def unlabelled(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without its `TARGETS`, but for labels that a decoder reads, shifted, as its own inputs."""
    inputs: dict[str, Any] = {key: value for key, value in in_own_dtype(model, batch).items() if key not in TARGETS}
    labels: Any = batch.get("labels")
    shifted: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if getattr(model.config, "is_encoder_decoder", False) and shifted and _are_classes(labels) and labels.ndim == 2:
        inputs.setdefault("decoder_input_ids", shifted(labels=labels))
    return inputs


def in_own_dtype(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose images are of the model's dtype, which not every model makes of them itself."""
    pixels, dtype = batch.get("pixel_values"), getattr(model, "dtype", None)
    return {**batch, "pixel_values": pixels.to(dtype)} if isinstance(pixels, Tensor) and dtype else batch


def span_logits(outputs: Any, batch: dict[str, Any]) -> Tensor | None:
    """The logits of where answers begin and end [batch, 2, tokens], the least there are where tokens are padding.

    None of outputs of another kind.
    """
    start, end = getattr(outputs, "start_logits", None), getattr(outputs, "end_logits", None)
    if not isinstance(start, Tensor) or not isinstance(end, Tensor):
        return None
    logits, mask = torch.stack([start, end], dim=1).float(), batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != start.shape:
        return logits
    return logits.masked_fill(~mask.bool().to(logits.device)[:, None], torch.finfo(logits.dtype).min)


def _of_spans(logits: Tensor) -> Predicted:
    samples = torch.arange(len(logits), device=logits.device).repeat_interleave(2)
    possible = logits[:, 0] > torch.finfo(logits.dtype).min
    return Predicted("classes", logits.flatten(0, 1), samples, len(logits), possible)


def _of_samples(kind: str, values: Tensor) -> Predicted:
    return Predicted(kind, values, torch.arange(len(values), device=values.device), len(values))


def _of_tokens(kind: str, values: Tensor, batch: dict[str, Any], causal: bool = False) -> Predicted:
    """The rows that count of values [batch, tokens, k]."""
    counts = _counts(batch, values.shape[:2], values.device, causal)
    kept = values[:, :-1] if causal else values
    return Predicted(kind, kept[counts].float(), counts.nonzero()[:, 0], len(values))


def _counts(batch: dict[str, Any], shape: torch.Size, device: torch.device, causal: bool) -> Tensor:
    """Which tokens count [batch, tokens], one less if `causal`: there a token whose next one is known."""
    labels: Any = batch.get("labels")
    mask: Any = batch.get("attention_mask")
    if _are_classes(labels) and labels.shape == shape:
        known = (labels != IGNORED).to(device)
        return known[:, 1:] if causal else known
    same = isinstance(mask, Tensor) and mask.shape == shape
    known = mask.bool().to(device) if same else torch.ones(shape, dtype=torch.bool, device=device)
    return known[:, 1:] & known[:, :-1] if causal else known


def _kind(model: nn.Module, logits: Tensor, labels: Any) -> str:
    """What logits [batch, k] of whole samples are, as transformers' own losses decide it."""
    problem = getattr(model.config, "problem_type", None)
    if problem in PROBLEMS:
        return PROBLEMS[problem]
    if logits.shape[1] == 1:
        return "numbers"
    return "flags" if isinstance(labels, Tensor) and labels.is_floating_point() else "classes"


def _are_classes(labels: Any) -> bool:
    return isinstance(labels, Tensor) and not labels.is_floating_point()


def _size(batch: dict[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0)


def _of_classes(reference: Tensor, other: Tensor) -> Tensor:
    return F.kl_div(other.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True).sum(dim=1)


def _of_flags(reference: Tensor, other: Tensor) -> Tensor:
    true = F.binary_cross_entropy_with_logits
    share = reference.sigmoid()
    return (true(other, share, reduction="none") - true(reference, share, reduction="none")).sum(dim=1)


def _of_numbers(reference: Tensor, other: Tensor) -> Tensor:
    return (reference - other).square().sum(dim=1) / 2


_DIVERGENCES = {"classes": _of_classes, "flags": _of_flags, "numbers": _of_numbers, "vector": _of_numbers}
