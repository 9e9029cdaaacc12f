"""A Llama and the second moments of its layers' inputs → the model with neighbouring blocks sharing one basis.

Basis Sharing (Wang et al., ICLR 2025): layers of a kind in two blocks behind each other are stacked, W = [W₁; W₂], and
factorized together for the inputs of both, A = A₁ + A₂, so that they share `down` and have an `up` each. Not those
whose inputs differ too much by the paper, `o_proj` and `down_proj`: they are whitened for themselves.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_lowrank import METHODS
from hf_lowrank.statistics import Statistics

SHARED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ALONE = ("self_attn.o_proj", "mlp.down_proj")
TOGETHER = 2  # blocks


@torch.no_grad()
def basis_sharing(model: Any, statistics: Statistics, share: float) -> tuple[Any, int]:
    """Change the blocks of `model` in place to weights of at most a share of their parameters, the same in each group.

    Args:
        model: a Llama without biases.
        statistics: with "activation_moment" and "active_tokens" of all linears of the blocks.
        share: of the parameters of the blocks' linears.

    Returns the model, with products in the place of factors, and how many parameters the factors have.
    """
    kept = 0
    for names in _groups(model):
        weights = [model.get_submodule(name).weight for name in names]
        shape = torch.cat(weights).shape
        rank = max(1, int(share * shape.numel() / sum(shape)))
        if rank >= min(shape):
            kept += shape.numel()
            continue
        for weight, product in zip(weights, _together(weights, statistics, names, rank), strict=True):
            weight.copy_(product)
        kept += rank * sum(shape)
    return model, kept


def _groups(model: Any) -> Iterator[list[str]]:
    """The names of the layers that share a basis."""
    blocks = [f"model.layers.{number}" for number in range(len(model.model.layers))]
    for start in range(0, len(blocks), TOGETHER):
        for part in SHARED:
            yield [f"{block}.{part}" for block in blocks[start : start + TOGETHER]]
    yield from ([f"{block}.{part}"] for block in blocks for part in ALONE)


def _together(weights: list[Tensor], statistics: Statistics, names: list[str], rank: int) -> list[Tensor]:
    """The best weights of one basis for the inputs of all of the layers."""
    means = {
        kind: sum(statistics.mean(kind, name) for name in names) for kind in ("activation_moment", "active_tokens")
    }
    product = METHODS["whiten"].objective(means).factorize(torch.cat(weights), rank).product()  # type: ignore[arg-type]
    return list(product.to(weights[0]).split([len(weight) for weight in weights]))
