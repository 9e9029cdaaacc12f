"""A Gram matrix in float32, and what it is by float64 on a few vectors → whether its leading subspace is good enough.

With an error E of the matrix [s, s], of entries e = ‖E‖ / s in any basis, its leading eigenvectors of a rank r keep
less than the best: to second order by the sum of e² / (λ_i − λ_j) over all i ≤ r < j. What is left out is found to be
off by the trace of E there, e √s at most where entries are independent.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# From this width on float32 pays, which takes half as long on a CPU, and far less on most accelerators.
WIDE = 512

# What float32 may cost, relative to the error of the factors, or to this share of the whole weight's if that is more.
TOLERANCE, LEAST = 1e-5, 1e-3

PROBES = 8


def excess(worth: Tensor, rank: int, error: float) -> float:
    """How far the error of factors may be from the least, relative to it, by a Gram matrix [s, s] that is not exact.

    An error below `LEAST` of the whole counts as that: float32 has no more digits for it, and the factors are all but
    the weight.

    Args:
        worth: its eigenvalues [s], largest first, in float64.
        rank: of the factors.
        error: ‖E‖, the Frobenius norm of what the matrix is off by.
    """
    size, left = len(worth), max(float(worth[rank:].sum()), LEAST * float(worth.sum()))
    entry = error / size
    gaps = (worth[:rank, None] - worth[rank:]).clamp_min(max(entry, torch.finfo(worth.dtype).tiny))
    kept_less = float(entry**2 * gaps.reciprocal().sum())
    return (kept_less + entry * size**0.5) / left if left > 0 else float("inf")


def distance(found: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """‖A − B‖ of two matrices [s, s] that are known by what they make of vectors in float64, estimated on a few.

    Args:
        found: A @ vectors.
        exact: B @ vectors.
        like: a tensor [s, …], on the device of the vectors.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(like), PROBES, generator=generator, dtype=torch.float64).to(like.device)
    return float((found(vectors) - exact(vectors)).square().sum(0).mean().sqrt())
