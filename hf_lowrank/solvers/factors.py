"""The two factors of a weight, and their balance."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """`up` [out, rank] and `down` [rank, in], whose product stands for a weight [out, in].

    `trace` holds the objective before the first and after every iteration, for methods that iterate.
    """

    up: Tensor
    down: Tensor
    trace: tuple[float, ...] = ()

    def product(self) -> Tensor:
        """`up @ down` [out, in]."""
        return self.up @ self.down

    def balanced(self) -> "Factors":
        """The same product from factors of equal singular values, √σ each.

        Low precision and fine-tuning behave best where neither factor is much larger than the other.
        """
        q_up, r_up = torch.linalg.qr(self.up)
        q_down, r_down = torch.linalg.qr(self.down.T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T)
        root = s.sqrt()
        return Factors(q_up @ (u * root), (root[:, None] * vh) @ q_down.T, self.trace)
