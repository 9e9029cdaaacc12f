"""A teacher and texts → how much errors of its hidden states after every block matter to what it predicts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.statistics.labels import projected_losses
from hf_lowrank.training.told import Batch, Teacher

DAMPING = 0.1  # times the mean eigenvalue is added to all: what mattered on few texts is not all that does


def hidden_metrics(teacher: Teacher, batches: Iterable[Batch]) -> list[Tensor]:
    """For the hidden states after every block a matrix G [width, width]: a token's error e costs eᵀ G e / 2 nats.

    G is the mean over tokens of the Gauss-Newton matrix of a text's divergence, by the random signs of `ModelLabels`:
    an error in a direction that the blocks behind do not read, or that no prediction depends on, counts for little. Of
    feature maps, which are no [texts, tokens, width], it is a single number, the mean over all entries.
    """
    sums: list[Tensor] = []
    tokens: list[float] = []
    first = 0
    with _differentiable(teacher.model), torch.enable_grad():
        for given in batches:
            batch = {key: value.to(teacher.model.device) for key, value in given.items()}
            told = teacher.asked(batch)
            numbers = range(first, first + told.predicted.samples)
            loss = projected_losses(told.predicted, numbers, seed=0).sum()
            gradients = torch.autograd.grad(loss, told.hidden, allow_unused=True)
            found = [_moment(state, gradient) for state, gradient in zip(told.hidden, gradients, strict=True)]
            counts = [_tokens(state, mask) for state, mask in zip(told.hidden, told.masks(batch), strict=True)]
            sums = [one + more for one, more in zip(sums, found, strict=True)] if sums else found
            tokens = [one + more for one, more in zip(tokens, counts, strict=True)] if tokens else counts
            first = numbers.stop
    return [_damped(moment / count) for moment, count in zip(sums, tokens, strict=True)]


def _moment(state: Tensor, gradient: Tensor | None) -> Tensor:
    """Σ g gᵀ over tokens; of feature maps the mean of g² over entries, times the samples; 0 of what has no effect."""
    rows = torch.zeros_like(state) if gradient is None else gradient
    if state.ndim != 3:
        return rows.float().square().mean() * len(rows)
    rows = rows.float().flatten(0, 1)
    return rows.T @ rows


def _tokens(state: Tensor, mask: Tensor | None) -> float:
    """How many tokens a batch has, or samples of feature maps."""
    if state.ndim != 3:
        return len(state)
    return state.shape[0] * state.shape[1] if mask is None else float(mask.sum())


def _damped(moment: Tensor) -> Tensor:
    if moment.ndim == 0:
        return moment
    mean = moment.diagonal().mean()
    return moment + DAMPING * mean * torch.eye(len(moment), device=moment.device)


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Within the block all weights of the model take part in graphs, frozen ones too."""
    frozen = [weight for weight in model.parameters() if weight.is_floating_point() and not weight.requires_grad]
    try:
        _require(frozen, True)
        yield
    finally:
        _require(frozen, False)


def _require(weights: list[nn.Parameter], wanted: bool) -> None:
    for weight in weights:
        weight.requires_grad_(wanted)
