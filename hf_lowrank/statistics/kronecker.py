"""Inputs x and output gradients g → the Kronecker product nearest to the Fisher information of whole samples.

Of the gradients G_n = Σ_t g_t x_tᵀ [out, in] that information is F = E vec(G_n) vec(G_n)ᵀ. Rearranged it is a linear
map R A = E G_n A G_nᵀ from [in, in] to [out, out], in which A ⊗ B has rank 1: the nearest A and B are R's leading
singular vectors. Van Loan & Pitsianis (1993). Power iteration finds them, half a step in each pass over the data:
B = R A for an A of unit norm, then A = Rᵀ B for a B of unit norm, and so on. The norm of the newer factor is then
⟨F, A ⊗ B⟩ for unit factors; it rises with every pass.
"""

from functools import lru_cache

import torch
from torch import Tensor

# The turns end when no layer's norm has risen by more than this share.
RISE = 1e-3

# The length of a sketch of a gradient.
SKETCH = 256


def add_kronecker_in(total: Tensor, x: Tensor, g: Tensor, context: Tensor | None) -> None:
    """total [in, in] += Σ_n G_nᵀ B G_n for the output factor B [out, out] = `context` of unit norm."""
    if few_tokens(x, g):
        total += (x.mT @ (_between(g, context) @ x)).sum(dim=0)
    else:
        _add_products(total, x, g, context)


def add_kronecker_out(total: Tensor, x: Tensor, g: Tensor, context: Tensor | None) -> None:
    """total [out, out] += Σ_n G_n A G_nᵀ for the input factor A [in, in] = `context` of unit norm."""
    if few_tokens(x, g):
        total += (g.mT @ (_between(x, context) @ g)).sum(dim=0)
    else:
        _add_products(total, g, x, context)


def _add_products(total: Tensor, a: Tensor, b: Tensor, factor: Tensor | None) -> None:
    """total += Σ_n Gᵀ B G for G = Σ_t b_t a_tᵀ of each sample n, and B = `factor`."""
    for a_n, b_n in zip(a, b, strict=True):
        gradient = b_n.T @ a_n
        total += _between(gradient.T, factor)


def _between(rows: Tensor, factor: Tensor | None) -> Tensor:
    """rows · factor · rowsᵀ, for rows [..., n]; without a factor, the identity of unit norm takes its place."""
    return rows @ rows.mT / rows.shape[-1] ** 0.5 if factor is None else rows @ factor @ rows.mT


def few_tokens(x: Tensor, g: Tensor) -> bool:
    """Whether a Gram matrix [tokens, tokens] takes less than the gradient [out, in] of a sample."""
    inputs, outputs = x.shape[2], g.shape[2]
    return x.shape[1] * (inputs + outputs) <= inputs * outputs


def unit(factor: Tensor) -> Tensor:
    """A factor at unit Frobenius norm."""
    return factor / _norm(factor).clamp_min(torch.finfo(factor.dtype).tiny)


def rise(a: Tensor, b: Tensor) -> float:
    """By what share the norm of the newer of two factors, whichever that is, has risen above that of the older."""
    lower, higher = sorted((float(_norm(a)), float(_norm(b))))
    return higher / lower - 1 if lower > 0 else 0.0


def add_fisher_sketch(total: Tensor, x: Tensor, g: Tensor, context: None = None) -> None:
    """total [SKETCH, SKETCH] += Σ_n s_n s'_nᵀ for two independent sketches of G_n: its mean has about the norm of F.

    ‖F‖² = E ⟨G_n, G_m⟩² over pairs of samples, and ⟨s_n, s_m⟩ ⟨s'_n, s'_m⟩ stands for ⟨G_n, G_m⟩². A sketch is the
    products of G_n with random p qᵀ of signs, at G_n's own norm: exact where gradients are parallel.
    """
    norms = _gradient_norms(x, g)
    first, second = (_sketch(x, g, norms, seed) for seed in (0, 2))
    total += first.T @ second


def _sketch(x: Tensor, g: Tensor, norms: Tensor, seed: int) -> Tensor:
    """Sketches [batch, SKETCH] of the gradients of norms [batch]."""
    products = ((g @ _signs(g.shape[-1], seed).to(g)) * (x @ _signs(x.shape[-1], seed + 1).to(x))).sum(dim=1)
    length = products.norm(dim=1).clamp_min(torch.finfo(products.dtype).tiny)
    return products * (norms / length)[:, None]


def _gradient_norms(x: Tensor, g: Tensor) -> Tensor:
    """‖G_n‖ of every sample [batch]."""
    if few_tokens(x, g):
        return ((g @ g.mT) * (x @ x.mT)).sum(dim=(1, 2)).clamp_min(0).sqrt()
    return torch.stack([(g_n.T @ x_n).norm() for x_n, g_n in zip(x, g, strict=True)])


@lru_cache(maxsize=64)
def _signs(features: int, seed: int) -> Tensor:
    """Random signs [features, SKETCH], the same in every process and on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (features, SKETCH), generator=generator).float() * 2 - 1


def cosine(a: Tensor, b: Tensor, sketch: Tensor) -> float:
    """That of A ⊗ B with F, from the factors as the turns left them and the mean `sketch`; 0 without gradients.

    ⟨F, A ⊗ B⟩ is exact, and ‖F‖ is estimated to a few percent.
    """
    whole = float(_norm(sketch))
    return min(1.0, max(float(_norm(a)), float(_norm(b))) / whole) if whole > 0 else 0.0


def _norm(tensor: Tensor) -> Tensor:
    """Frobenius, added up in float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)
