"""A layer's weight and objective → what truncation and rounding to few bits lose together, at every rank."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.allocation.stored import Stored, group_of
from hf_lowrank.solvers.expected_rounding import pivots
from hf_lowrank.solvers.scaled import Scaled

# Mean squared change of Gaussian weights, relative to their variance, by bits and by whether groups share a scale:
# what rounding to the nearest of a clipped grid does to them. In the flat gauge factors are nearly Gaussian.
ROUNDING = {(8, False): 5.2e-5, (4, False): 1.1e-2, (4, True): 7.7e-3}

# Points at which a sum over channels is integrated.
POINTS = 96


@dataclass(frozen=True)
class RoundedLoss:
    """The expected loss of a layer that is kept as a `Stored` says, truncation and rounding together.

    Rounding is that of `solvers.rounded_factors`: noise of variance v in every weight of `down` costs v times the sum
    of the pivots of UᵀGU times that of A, in every weight of `up` v times those of DADᵀ and G, v being `ROUNDING` times
    the mean square of a row. To the nearest, traces would stand for sums of pivots. Where the inner channels all carry
    the same, which the flat gauge brings about, products of traces come to sums over the directions, whatever the rank:
    (Σ √(N_kk M_kk))² / r for `down` and (Σ √(Σ_kk P_kk))² / r for `up`, in the terms of `solvers.gauge`; and pivots are
    those of a random rotation of the directions' moments (see `rotated_pivots`). Of the noise in `down` the share
    r / in lies where `up` takes it up.

    Args:
        width: of the dense weight's rows, and of those of `down` unless it is an embedding.
        tails: what truncation to a rank loses [min(out, in) + 1].
        down: what a relative squared change of 1 of the rows of `down` costs at every rank [min(out, in) + 1].
        up: the same of `up`; that of an embedding is not rounded.
        dense: the same of the dense weight.
        unit: expected loss per error of the objective.
        lookup: whether it is an embedding, whose rows are those of tokens.
    """

    width: int
    tails: Tensor
    down: Tensor
    up: Tensor
    dense: float
    unit: float
    lookup: bool

    @classmethod
    def of(cls, weight: Tensor, sides: Scaled, unit: float, lookup: bool = False) -> "RoundedLoss":
        """That of a weight [out, in] under an error ‖L Δ Rᵀ‖², which `unit` turns into expected loss.

        Args:
            weight: [out, in].
            sides: of the error, which is of centred inputs where a bias makes up for what becomes of their mean.
            unit: expected loss per error.
            lookup: whether it is an embedding.
        """
        factors, weight = sides.factorize(weight, min(weight.shape)), weight.double()
        up, down = factors.up.double(), factors.down.double()
        left, right = (moment.to(up) for moment in (sides.left.diagonal(len(up)), sides.right.diagonal(down.shape[1])))
        saved_left, saved_right = (
            float(pivots(side.gram(size)).sum() / side.power(size))
            for side, size in ((sides.left, len(up)), (sides.right, down.shape[1]))
        )
        inputs = (down * sides.right.square(down.T).T).sum(1)
        outputs = (up * sides.left.square(up)).sum(0)
        noise = inputs if lookup else down.square().sum(1) * right.mean()
        counted = (up.square() * left[:, None]).sum(0)
        squares = weight.square()
        rows = squares.sum(0) @ right * left.mean() if lookup else squares.sum(1) @ left * right.mean()
        worth = (inputs * outputs).clamp_min(0)
        ranks = torch.arange(len(worth) + 1, dtype=worth.dtype, device=worth.device).clamp_min(1)
        by_channel = rotated_pivots(worth.sqrt())
        by_down = by_channel * (1 - (ranks / down.shape[1]).clamp_max(1))
        return cls(
            weight.shape[0] if lookup else weight.shape[1],
            _from_first(worth.flip(0)).flip(0),
            _from_first((noise * outputs).clamp_min(0).sqrt()).square() / ranks * by_down * saved_right,
            _from_first((inputs * counted).clamp_min(0).sqrt()).square() / ranks * by_channel * saved_left,
            float(rows) * saved_left * saved_right,
            unit,
            lookup,
        )

    def __call__(self, stored: Stored) -> float:
        rank = stored.rank
        if rank is None:
            return self.unit * _share(self.width, stored.bits) * self.dense
        down = _share(rank if self.lookup else self.width, stored.bits) * float(self.down[rank])
        up = 0.0 if self.lookup else _share(rank, stored.bits) * float(self.up[rank])
        return self.unit * (float(self.tails[rank]) + down + up)


def rotated_pivots(values: Tensor) -> Tensor:
    """The expected sum of pivots of a random rotation of diag(the first 0, 1, 2, … values), as a share of its trace.

    After k of n pivots what is left of every channel is p = k / Σ 1 / (v + c), with the c at which Σ v / (v + c) = k,
    for large n: from the arithmetic mean of the values to the harmonic one. The sum over k is an integral over c.
    """
    values = values.clamp_min(1e-12 * max(float(values.max()), 1e-100))
    low, high = float(values.min()) / 1e4, float(values.max()) * len(values) * 1e4
    c = torch.logspace(math.log10(low), math.log10(high), POINTS, dtype=values.dtype, device=values.device)[:, None]
    done = (values / (values + c)).cumsum(1)  # k [points, n]
    left = done / (1 / (values + c)).cumsum(1)
    return _ones_from(torch.trapezoid(left.flip(0), done.flip(0), dim=0) / values.cumsum(0))


def _ones_from(values: Tensor) -> Tensor:
    return torch.cat([values.new_ones(1), values.clamp_max(1.0)])


def _share(width: int, bits: int) -> float:
    return ROUNDING[bits, group_of(width, bits) is not None]


def _from_first(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, … values."""
    return values.new_zeros(len(values) + 1).slice_scatter(values.cumsum(0), start=1)
