"""A weight and what counts on both its sides → its directions in the order of their worth, found once for every rank.

The best approximation of a weight [out, in] at a rank is an oblique projection of it: W ≈ P Qᵀ W where outputs are the
shorter side, and W ≈ W Q Pᵀ where inputs are, with QᵀP = 1. The leading columns of P and Q are those of a smaller rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.solvers.factors import Factors

# Directions count at least this share of the first one's squared singular value: those worth nothing can be scaled too.
FLOOR = 1e-14


@dataclass(frozen=True)
class Decomposition:
    """The singular directions of L W Rᵀ for a weight W [out, in], under an error ‖L Δ Rᵀ‖².

    Args:
        worth: their squared singular values [min(out, in)], largest first: what discarding each adds to the error.
        span: P [min(out, in), k] of the first k, in float32, the precision of weights.
        dual: Q [min(out, in), k].
        outputs: the diagonal of LᵀL [out], in float64 as `worth`.
        inputs: that of RᵀR [in].
    """

    worth: Tensor
    span: Tensor
    dual: Tensor
    outputs: Tensor
    inputs: Tensor

    @property
    def most(self) -> int:
        """The greatest rank of `factors`."""
        return self.span.shape[1]

    def to(self, device: torch.device | str) -> "Decomposition":
        """The same on a device."""
        return Decomposition(*(part.to(device) for part in vars(self).values()))

    def error(self, rank: int) -> Tensor:
        """That of the best factors of a rank, a scalar; at rank 0 of leaving out the whole weight."""
        return self.worth[rank:].sum()

    def mass(self, shape: tuple[int, int]) -> Tensor:
        """‖L‖²_F ‖R‖²_F, a scalar."""
        return self.outputs.sum() * self.inputs.sum()

    def energies(self, rank: int) -> Tensor:
        """σ [rank], the singular values of the first directions, none of them 0."""
        least = torch.where(self.worth[0] > 0, FLOOR * self.worth[0], 1.0)
        return self.worth[:rank].clamp_min(least).sqrt()

    def factors(self, weight: Tensor, rank: int) -> Factors:
        """The best factors of `weight` [out, in], in float64, with Uᵀ LᵀL U = D RᵀR Dᵀ = diag(σ) by `energies`."""
        tall = weight.shape[0] > weight.shape[1]
        scale = self.energies(rank).sqrt()
        span, dual = (part[:, :rank].double().contiguous() for part in (self.span, self.dual))
        longer = dual.T @ (weight.T if tall else weight).double() / scale[:, None]
        return Factors(longer.T, (span * scale).T) if tall else Factors(span * scale, longer)
