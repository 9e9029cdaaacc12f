"""The second moment of channels → those that are kept, and how the others follow from them (Nyström)."""

import torch
from torch import Tensor

from hf_lowrank.errors import LowRankError

RIDGE = 1e-8  # of the mean diagonal, so that channels that say the same can be told apart


def nystrom(moment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The channels to keep [width], in order, and the matrix M [n, width] with x ≈ M x_kept in mean square.

    Channels are chosen by their ridge leverage scores, diag(C (C + λ)⁻¹) for a moment C [n, n], with what is left of
    C beyond its first `width` directions, divided by `width`, as λ (Cohen, Musco & Musco, 2017). M = C_S C_SS⁻¹ is
    least squares. For the channels between the layers of an MLP this is what MoDeGPT does (Lin et al., ICLR 2025).

    Args:
        moment: C, symmetric, of any scale.
        width: from 1 to n.

    Raises:
        LowRankError: the width is out of range.
    """
    size = len(moment)
    if not 1 <= width <= size:
        raise LowRankError(f"of {size} channels 1 to {size} can be kept, not {width}")
    moment = moment.double()
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    ridge = torch.maximum(values[: size - width].sum() / width, RIDGE * values.mean())
    scores = vectors.square() @ (values / (values + ridge).clamp_min(torch.finfo(values.dtype).tiny))
    kept = scores.topk(width).indices.sort().values
    inner = moment[kept][:, kept]
    mean = inner.diagonal().mean()
    inner.diagonal().add_(RIDGE * torch.where(mean > 0, mean, 1.0))  # all zero: nothing follows from those kept
    mixed = torch.linalg.solve(inner, moment[kept]).T
    mixed[kept] = torch.eye(width, dtype=mixed.dtype, device=mixed.device)
    return kept, mixed
