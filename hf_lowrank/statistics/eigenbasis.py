"""Two moments of a layer → the basis in which its inputs and its output gradients are uncorrelated."""

import torch
from torch import Tensor


def eigenbasis(left_moment: Tensor, right_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors of two moments [n, n], in columns, in float32: the same for the same moments."""
    left, right = (torch.linalg.eigh(moment.double())[1].float() for moment in (left_moment, right_moment))
    return left, right
