"""A layer's weight and objective → what truncation and rounding to few bits lose together, at every rank."""

from dataclasses import dataclass

from torch import Tensor

from hf_lowrank.allocation.stored import Stored, group_of
from hf_lowrank.solvers.scaled import Scaled

# Mean squared change of Gaussian weights, relative to their variance, by bits and by whether groups share a scale:
# what `folder.packing.rounded` does to them. In the flat gauge factors are nearly Gaussian.
ROUNDING = {(8, False): 5.2e-5, (4, False): 1.1e-2, (4, True): 7.7e-3}


@dataclass(frozen=True)
class RoundedLoss:
    """The expected loss of a layer that is kept as a `Stored` says, truncation and rounding together.

    Noise of variance v in every weight of `down` costs v tr(A) tr(UᵀGU), in every weight of `up` v tr(DADᵀ) tr(G). v is
    `ROUNDING` times the mean square of a row. Where the inner channels all carry the same, which the flat gauge brings
    about, this comes to sums over the directions, whatever the rank: (Σ √(N_kk M_kk))² / r for `down` and
    (Σ √(Σ_kk P_kk))² / r for `up`, in the terms of `solvers.gauge`.

    Args:
        width: of the dense weight's rows, and of those of `down` unless it is an embedding.
        tails: what truncation to a rank loses [min(out, in) + 1].
        down: Σ √(N_kk M_kk) over the first directions [min(out, in) + 1].
        up: Σ √(Σ_kk P_kk), the same; that of an embedding is not rounded.
        dense: what a relative squared change of 1 of the rows of the dense weight costs.
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
    def of(cls, weight: Tensor, sides: Scaled, rounding: Scaled, unit: float, lookup: bool = False) -> "RoundedLoss":
        """That of a weight [out, in] under an error ‖L Δ Rᵀ‖², which `unit` turns into expected loss.

        Args:
            weight: [out, in].
            sides: of what truncation changes.
            rounding: of what rounding changes, which no bias makes up for (see `methods.rounding_sides`).
            unit: expected loss per error.
            lookup: whether it is an embedding.
        """
        factors, weight = sides.factorize(weight, min(weight.shape)), weight.double()
        up, down = factors.up.double(), factors.down.double()
        left, right = rounding.left.diagonal(len(up)), rounding.right.diagonal(down.shape[1])
        truncated = (down * sides.right.square(down.T).T).sum(1) * (up * sides.left.square(up)).sum(0)
        inputs = (down * rounding.right.square(down.T).T).sum(1)
        outputs = (up * rounding.left.square(up)).sum(0)
        noise = inputs if lookup else down.square().sum(1) * right.mean()
        counted = (up.square() * left[:, None]).sum(0)
        squares = weight.square()
        rows = squares.sum(0) @ right * left.mean() if lookup else squares.sum(1) @ left * right.mean()
        return cls(
            weight.shape[0] if lookup else weight.shape[1],
            _from_first(truncated.flip(0)).flip(0),
            _from_first((noise * outputs).clamp_min(0).sqrt()),
            _from_first((inputs * counted).clamp_min(0).sqrt()),
            float(rows),
            unit,
            lookup,
        )

    def __call__(self, stored: Stored) -> float:
        rank = stored.rank
        if rank is None:
            return self.unit * _share(self.width, stored.bits) * self.dense
        down = _share(rank if self.lookup else self.width, stored.bits) * float(self.down[rank]) ** 2 / rank
        up = 0.0 if self.lookup else _share(rank, stored.bits) * float(self.up[rank]) ** 2 / rank
        return self.unit * (float(self.tails[rank]) + down + up)


def _share(width: int, bits: int) -> float:
    return ROUNDING[bits, group_of(width, bits) is not None]


def _from_first(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, … values."""
    return values.new_zeros(len(values) + 1).slice_scatter(values.cumsum(0), start=1)
