"""A layer, what counts on both sides and how it is rounded → the error that is expected of that, in units of `Scaled`.

Rounding adds noise of variance step² / 12 to every number by itself. An entry of a weight counts Gₒₒ Aⱼⱼ, or gₒ aⱼ
where it is rounded by `round_with_moments`; a channel of activations counts the diagonal of the moment behind it. Half
of the error, times the loss per error, is the expected loss, as that of truncation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import ACTIVATION_PEAK, with_ridge
from hf_lowrank.solvers.rounding import Grid, unit_upper
from hf_lowrank.solvers.scaled import Scaled


@dataclass(frozen=True)
class Scheme:
    """How a layer is rounded: its weights to a grid, and activations to `activation_bits` of one scale, or not at all.

    `with_moments` says that weights are rounded by `round_with_moments`, not each to the nearest.
    """

    grid: Grid
    activation_bits: int | None = None
    with_moments: bool = False


def error_of_factors(factors: Factors, sides: Scaled, scheme: Scheme, lookup: bool = False) -> float:
    """The expected error of rounding `up` [out, r], `down` [r, in] and what flows into them, in the basis they are in.

    With `lookup`, `down` is an embedding: its rows are those of tokens, and nothing flows into it.
    """
    up, down = factors.up.double(), factors.down.double()
    inner = with_ridge(down @ sides.right.square(down.T))
    behind = with_ridge(up.T @ sides.left.square(up))
    inputs, outputs = sides.right.gram(down.shape[1]), sides.left.gram(len(up))
    first = _of_weight(down.T, inputs, behind, scheme) if lookup else _of_weight(down, behind, inputs, scheme)
    error = first + _of_weight(up, outputs, inner, scheme) + _of_activations(inner, behind.trace(), scheme)
    if not lookup:
        error += _of_activations(inputs, (down * (behind @ down)).sum(), scheme)
    return float(error)


def error_of_dense(weight: Tensor, sides: Scaled, scheme: Scheme, lookup: bool = False) -> float:
    """The expected error of rounding a weight [out, in] and its inputs; with `lookup`, of an embedding [in, out]."""
    weight = weight.double()
    inputs, outputs = sides.right.gram(weight.shape[1]), sides.left.gram(len(weight))
    if lookup:
        return float(_of_weight(weight.T, inputs, outputs, scheme))
    behind = (weight * sides.left.square(weight)).sum()
    return float(_of_weight(weight, outputs, inputs, scheme) + _of_activations(inputs, behind, scheme))


def _of_weight(weight: Tensor, outputs: Tensor, inputs: Tensor, scheme: Scheme) -> Tensor:
    variances = scheme.grid.steps(weight).square() / 12
    rows, columns = (_counts(moment.to(weight.device), scheme.with_moments) for moment in (outputs, inputs))
    return rows @ variances @ columns


def pivots(moment: Tensor) -> Tensor:
    """What the rounding of every entry along a side counts, where entries make up for each other [n]."""
    return unit_upper(moment)[1]


def _counts(moment: Tensor, with_moments: bool) -> Tensor:
    """What it counts [n]."""
    if with_moments:
        return pivots(moment)
    return moment if moment.ndim == 1 else moment.diagonal()


def _of_activations(moment: Tensor, behind: Tensor, scheme: Scheme) -> Tensor:
    """Of activations of a second moment, where `behind` is what a change of all of them by 1 counts."""
    if scheme.activation_bits is None:
        return torch.zeros_like(behind)
    variances = moment if moment.ndim == 1 else moment.diagonal()
    step = 2 * ACTIVATION_PEAK * variances.max().sqrt() / (2**scheme.activation_bits - 1)
    return step.square() / 12 * behind
