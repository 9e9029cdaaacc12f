"""What can be measured of a linear layer, from its inputs x and output gradients g [batch, tokens, in or out].

The gradient of sample n's own loss by the weight is G_n = Σ_t g_t x_tᵀ [out, in]. Each kind is added up over samples in
place, in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Gradients of several samples are formed at once up to this many elements (256 MiB); on a CPU, one at a time, in cache.
BATCH_ELEMENTS = 2**26


@dataclass(frozen=True)
class Kind:
    """One statistic: its unit, its shape for a weight [out, in], and the function that adds a batch to its sum."""

    name: str
    unit: str
    shape: Callable[[int, int], tuple[int, ...]]
    add: Callable[[Tensor, Tensor, Tensor], None]


def add_fisher(total: Tensor, x: Tensor, g: Tensor) -> None:
    """total [out, in] += Σ_n G_n²: the empirical Fisher information of every weight."""
    chunk = 1 if x.device.type == "cpu" else max(1, BATCH_ELEMENTS // total.numel())
    for x_n, g_n in zip(x.split(chunk), g.split(chunk), strict=True):
        if len(x_n) == 1:
            gradient = g_n[0].T @ x_n[0]
            total.addcmul_(gradient, gradient)
        else:
            total += (g_n.mT @ x_n).square_().sum(dim=0)


def add_fisher_rows(total: Tensor, x: Tensor, g: Tensor) -> None:
    """total [in] += Σ_n Σ_out G_n²: what FWSVD pools, one number for each input feature.

    Σ_out (Σ_t g_t x_t)² = Σ_t x_t ⊙ (g gᵀ x)_t needs only the [tokens, tokens] Gram matrix of g, which is cheaper than
    G_n for samples of fewer tokens than about in·out / (in + out).
    """
    (tokens, inputs), outputs = x.shape[1:], g.shape[2]
    if tokens * (inputs + outputs) <= inputs * outputs:
        total += (x * ((g @ g.mT) @ x)).sum(dim=(0, 1))
    else:
        for x_n, g_n in zip(x, g, strict=True):
            total += (g_n.T @ x_n).square_().sum(dim=0)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fisher", "(loss / weight)², sum over samples", lambda out, in_: (out, in_), add_fisher),
        Kind("fisher_rows", "(loss / weight)², sum over outputs and samples", lambda out, in_: (in_,), add_fisher_rows),
    )
}
