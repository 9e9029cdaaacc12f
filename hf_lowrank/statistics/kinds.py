"""What can be measured of a linear layer, from its inputs x and output gradients g [batch, tokens, in or out].

The gradient of sample n's own loss by the weight is G_n = Σ_t g_t x_tᵀ [out, in]. Each kind is added up over samples in
place, in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowrank.model.targets import Target
from hf_lowrank.statistics.eigenbasis import eigenbasis
from hf_lowrank.statistics.kronecker import (
    SKETCH,
    add_fisher_sketch,
    add_kronecker_in,
    add_kronecker_out,
    few_tokens,
    unit,
)
from hf_lowrank.statistics.names import KIND_NEEDS

# Gradients of several samples are formed at once up to this many elements (256 MiB); on a CPU, one at a time, in cache.
BATCH_ELEMENTS = 2**26

# A moment is added up in this many blocks of rows.
GRAM_BLOCKS = 6


@dataclass(frozen=True)
class Kind:
    """One statistic: its unit, its shape for a weight [out, in], and the function that adds a batch to its sum.

    `add` takes the sum, x, g and a context; `context` makes that once for each layer from the means of the kinds in
    `needs`, which an earlier pass over the data has measured. A kind `of_input` takes, in place of g, 1 where a token
    is active and 0 elsewhere [batch, tokens]: layers that read the same input have the same sum. One that is `lower`
    adds up the lower triangle of a symmetric sum, which `completed` mirrors. One that is `dense` cannot be measured of
    an embedding.
    """

    name: str
    unit: str
    shape: Callable[[int, int], tuple[int, ...]]
    add: Callable[[Tensor, Tensor, Tensor, Any], None]
    context: Callable[..., Any] | None = None
    of_input: bool = False
    lower: bool = False
    dense: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The kinds that an earlier pass over the data has measured."""
        return KIND_NEEDS[self.name]


def sum_shape(kind: str, target: Target) -> tuple[int, ...]:
    """The shape of the sum of a kind for a layer. An embedding's input moment is kept by its diagonal, counts."""
    out_features, in_features = target.shape
    by_diagonal = target.kind == "embedding" and kind == "activation_moment"
    return (in_features,) if by_diagonal else KINDS[kind].shape(out_features, in_features)


def accumulate(kind: str, total: Tensor, x: Tensor, g: Tensor, context: Any = None) -> None:
    """Add a batch to the sum of a kind, which may lie on another device than the batch.

    Integers x [batch, tokens, 1] stand for one-hot inputs.
    """
    if not x.is_floating_point():
        _accumulate_one_hot(kind, total, x[..., 0], g)
    elif total.device == x.device:
        KINDS[kind].add(total, x, g, context)
    else:
        part = torch.zeros_like(total, device=x.device)
        KINDS[kind].add(part, x, g, context)
        total += part.to(total.device)


def _accumulate_one_hot(kind: str, total: Tensor, ids: Tensor, g: Tensor) -> None:
    """Add a batch of one-hot inputs ids [batch, tokens] through those columns of the sum that they touch."""
    seen, columns = ids.unique(return_inverse=True)
    x = nn.functional.one_hot(columns, len(seen)).float()
    by_input = 0 in KINDS[kind].shape(1, 0)  # a sum whose last dimension is the input's
    part = total.index_select(-1, seen.to(total.device)) if by_input else total
    change = torch.zeros_like(part, device=x.device)
    accumulate(kind, change, x, g)
    if by_input:
        total.index_add_(-1, seen.to(total.device), change.to(total.device))
    else:
        total += change.to(total.device)


def active_tokens(largest: Tensor) -> Tensor:
    """1 where a sample's loss depends on a token and 0 elsewhere, from the largest entry of its gradient.

    Both [batch, tokens]; the largest entry is that of the gradients by the outputs of all layers that read the token.
    A token is active if its square is not lost in float32 beside that of the sample's most important token, whatever
    else is in the batch and whatever the model's dtype. To ask for exact zeros would be to ask how a machine rounds:
    the gradient by the query of a token that sees itself alone is 0 in exact arithmetic, and 0 or a billionth of its
    value's in practice. Padding is never active, nor is a position that no head reads, such as all but the first
    behind a last layer's attention.
    """
    least = torch.finfo(torch.float32).eps ** 0.5 * largest.float().amax(dim=1, keepdim=True)
    return (largest > least).float()


def add_fisher(total: Tensor, x: Tensor, g: Tensor, context: Any = None) -> None:
    """total [out, in] += Σ_n G_n²: the empirical Fisher information of every weight."""
    chunk = 1 if x.device.type == "cpu" else max(1, BATCH_ELEMENTS // total.numel())
    for x_n, g_n in zip(x.split(chunk), g.split(chunk), strict=True):
        if len(x_n) == 1:
            gradient = g_n[0].T @ x_n[0]
            total.addcmul_(gradient, gradient)
        else:
            total += (g_n.mT @ x_n).square_().sum(dim=0)


def add_fisher_rows(total: Tensor, x: Tensor, g: Tensor, context: Any = None) -> None:
    """total [in] += Σ_n Σ_out G_n²: what FWSVD pools, one number for each input feature.

    Σ_out (Σ_t g_t x_t)² = Σ_t x_t ⊙ (g gᵀ x)_t needs only the [tokens, tokens] Gram matrix of g, which is cheaper than
    G_n for samples of fewer tokens than about in·out / (in + out).
    """
    if few_tokens(x, g):
        total += (x * ((g @ g.mT) @ x)).sum(dim=(0, 1))
    else:
        for x_n, g_n in zip(x, g, strict=True):
            total += (g_n.T @ x_n).square_().sum(dim=0)


def _add_lower_gram(total: Tensor, rows: Tensor) -> None:
    """total [n, n] += rowsᵀ rows, for rows [tokens, n], on and below the diagonal: about half the products."""
    size = -(-len(total) // GRAM_BLOCKS)
    for start in range(0, len(total), size):
        end = min(start + size, len(total))
        total[start:end, :end].addmm_(rows[:, start:end].T, rows[:, :end])


def completed(kind: str, total: Tensor) -> Tensor:
    """The sum of a kind when all batches were added: a moment gets its upper triangle, in place."""
    if not KINDS[kind].lower or total.ndim < 2:
        return total
    size = -(-len(total) // GRAM_BLOCKS)
    for start in range(0, len(total), size):
        end = min(start + size, len(total))
        block = total[start:end, start:end]
        block.copy_(block.tril() + block.tril(-1).T)
        total[:start, start:end] = total[start:end, :start].T
    return total


def _rows_where(chosen: Tensor, values: Tensor) -> Tensor:
    """Those of values [batch, tokens, n] where `chosen` [batch, tokens] is not zero: [rows, n]."""
    return values.flatten(0, 1).index_select(0, chosen.flatten().nonzero()[:, 0])


def add_activation_moment(total: Tensor, x: Tensor, active: Tensor, context: Any = None) -> None:
    """total [in, in], or its diagonal [in], += Σ x xᵀ over the active tokens."""
    kept = _rows_where(active, x)
    if total.ndim == 1:
        total += kept.square().sum(dim=0)
    else:
        _add_lower_gram(total, kept)


def add_activation_magnitude(total: Tensor, x: Tensor, active: Tensor, context: Any = None) -> None:
    """total [in] += Σ |x| over the active tokens."""
    total += (x.abs() * active[..., None]).sum(dim=(0, 1))


def add_activation_mean(total: Tensor, x: Tensor, active: Tensor, context: Any = None) -> None:
    """total [in] += Σ x over the active tokens."""
    total += _rows_where(active, x).sum(dim=0)


def add_active_tokens(total: Tensor, x: Tensor, active: Tensor, context: Any = None) -> None:
    """total [] += the number of active tokens."""
    total += active.sum()


def add_gradient_moment(total: Tensor, x: Tensor, g: Tensor, context: Any = None) -> None:
    """total [out, out] += Σ g gᵀ over tokens."""
    _add_lower_gram(total, _rows_where(g.abs().amax(dim=-1), g))  # zeros add nothing


def add_fisher_in_eigenbasis(total: Tensor, x: Tensor, g: Tensor, context: tuple[Tensor, Tensor]) -> None:
    """total [out, in] += Σ_n (Q_Gᵀ G_n Q_A)², for the eigenvectors (Q_G [out, out], Q_A [in, in]) = `context`."""
    add_fisher(total, x @ context[1], g @ context[0])


def _out_in(out_features: int, in_features: int) -> tuple[int, ...]:
    return (out_features, in_features)


def _in_in(out_features: int, in_features: int) -> tuple[int, ...]:
    return (in_features, in_features)


def _out_out(out_features: int, in_features: int) -> tuple[int, ...]:
    return (out_features, out_features)


def _in(out_features: int, in_features: int) -> tuple[int, ...]:
    return (in_features,)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fisher", "(loss / weight)², sum over samples", _out_in, add_fisher),
        Kind("fisher_rows", "(loss / weight)², sum over outputs and samples", _in, add_fisher_rows),
        Kind(
            "activation_moment",
            "input², sum over active tokens",
            _in_in,
            add_activation_moment,
            of_input=True,
            lower=True,
        ),
        Kind("activation_magnitude", "|input|, sum over active tokens", _in, add_activation_magnitude, of_input=True),
        Kind("activation_mean", "input, sum over active tokens", _in, add_activation_mean, of_input=True),
        Kind("active_tokens", "tokens", lambda out_features, in_features: (), add_active_tokens, of_input=True),
        Kind("gradient_moment", "(loss / output)², sum over tokens", _out_out, add_gradient_moment, lower=True),
        Kind(
            "kronecker_in",
            "(loss / weight)², sum over samples",
            _in_in,
            add_kronecker_in,
            unit,
            dense=True,
        ),
        Kind(
            "kronecker_out",
            "(loss / weight)², sum over samples",
            _out_out,
            add_kronecker_out,
            unit,
            dense=True,
        ),
        Kind(
            "fisher_sketch",
            "(loss / weight)², sum over samples",
            lambda out_features, in_features: (SKETCH, SKETCH),
            add_fisher_sketch,
            dense=True,
        ),
        Kind(
            "fisher_in_eigenbasis",
            "(loss / rotated weight)², sum over samples",
            _out_in,
            add_fisher_in_eigenbasis,
            eigenbasis,
            dense=True,
        ),
    )
}
