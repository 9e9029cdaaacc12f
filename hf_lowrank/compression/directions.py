"""The factors of a layer and the objective they are the best for → what each direction is worth, and where it is.

Factors U D are the same function in every basis of their inner channels. In one of them the channels are the singular
directions of the scaled weight, the most valuable first, and the best factors of a smaller rank are the first channels:
Eckart & Young (1936). That basis and the worth of every direction are all that a further truncation needs to know.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hf_lowrank.jobs.checkpoint import Store
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import rotation


@dataclass(frozen=True)
class Directions:
    """The directions of factors `up` [out, r] and `down` [r, in].

    Args:
        basis: [r, r] in float16: `up @ basis` has the directions for columns, `basis⁻¹ @ down` for rows.
        worth: [r], what discarding each adds to the expected loss, largest first.
        mean: [r], the mean input along each, which a bias makes up for; 0 where there is none to do so.
    """

    basis: Tensor
    worth: Tensor
    mean: Tensor

    def truncated(self, factors: Factors, rank: int) -> tuple[Factors, "Directions", Tensor]:
        """The best factors of a smaller rank, in the basis of least loss under rounding, and their directions.

        And what of the mean output [out] is lost with the others. In the scale that `Decomposition.factors` gives them
        the directions have Uᵀ G U = D A Dᵀ: a rotation to equal variances is all that is left to do (see
        `hf_lowrank.solvers.gauge`).
        """
        basis, worth, mean = self.basis.double(), self.worth[:rank], self.mean.double()
        directions = factors.up.double() @ basis
        up, down = directions[:, :rank], torch.linalg.solve(basis, factors.down.double())[:rank]
        turned = rotation(worth.double().clamp_min(0).sqrt().diag())
        scale = (down.norm() / up.norm()).sqrt() if down.any() else torch.ones_like(up.norm())
        left = Directions(turned.T.half(), worth, (mean[:rank] / scale).float())
        return Factors(up @ turned * scale, turned.T @ down / scale), left, directions[:, rank:] @ mean[rank:]


PARTS = tuple(part.name for part in fields(Directions))


class KeptDirections(Mapping[str, Directions]):
    """The directions of layers whose factors are kept in a store, read when they are asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.names: dict[str, None] = {}

    def __getitem__(self, name: str) -> Directions:
        if name not in self.names:
            raise KeyError(name)
        tensors, _ = self.store.load(name)
        return Directions(*(tensors[part] for part in PARTS))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
