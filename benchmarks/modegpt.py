"""A Llama and the second moments of its layers' inputs → the model with the weights of MoDeGPT, as far as it is told.

MoDeGPT (Lin et al., ICLR 2025) shortens what modules have inside: inner channels of the MLP (Nyström), dimensions of
queries and keys (some are chosen, in pairs where positions are rotary), and those of values and outputs (SVD of the
product of both in each head). The weights keep their shapes here, zero in what would be gone.
Every block keeps the same share; the paper spreads shares by how much a block changes its input.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.solvers.methods import ACTIVATION_DAMPING
from hf_lowrank.solvers.nystrom import nystrom
from hf_lowrank.solvers.scaled import Scaled, Scaling, whitening
from hf_lowrank.statistics import Statistics


@dataclass(frozen=True)
class Widths:
    """What stays of a block: inner channels, pairs of dimensions of a key head, and dimensions of a value head."""

    inner: int
    pairs: int
    values: int

    @classmethod
    def of(cls, config: Any, share: float) -> "Widths":
        """Those of at most a share of a block's parameters, the MLP taking what rounding leaves of the attention's."""
        whole = cls(config.intermediate_size, config.head_dim // 2, config.head_dim)
        pairs, values = max(1, int(share * whole.pairs)), max(1, int(share * whole.values))
        left = share * whole.parameters(config) - cls(0, pairs, values).parameters(config)
        return cls(min(whole.inner, max(1, int(left / (3 * config.hidden_size)))), pairs, values)

    def parameters(self, config: Any) -> int:
        """The parameters of a block."""
        heads = config.num_attention_heads + config.num_key_value_heads
        return config.hidden_size * (3 * self.inner + heads * (2 * self.pairs + self.values))


@torch.no_grad()
def modegpt(model: Any, statistics: Statistics, share: float) -> tuple[Any, int]:
    """Change the blocks of `model` in place to keep at most a share of their parameters; the model, and how many stay.

    Args:
        model: a Llama without biases.
        statistics: with "activation_moment" and "active_tokens" of all linears of the blocks.
        share: of the parameters of the blocks' linears.
    """
    config, widths = model.config, Widths.of(model.config, share)
    for number, block in enumerate(model.model.layers):
        name = f"model.layers.{number}"
        _shorten_mlp(block.mlp, statistics.mean("activation_moment", f"{name}.mlp.down_proj"), widths.inner)
        inputs = statistics.mean("activation_moment", f"{name}.self_attn.q_proj").double()
        inputs = inputs / statistics.mean("active_tokens", f"{name}.self_attn.q_proj")
        for group in range(config.num_key_value_heads):
            _choose_pairs(block.self_attn, config, group, inputs, widths.pairs)
            _join_values(block.self_attn, config, group, inputs, widths.values)
    return model, len(model.model.layers) * widths.parameters(config)


def _shorten_mlp(mlp: Any, moment: Tensor, width: int) -> None:
    kept, mixed = nystrom(moment, width)
    weight = torch.zeros_like(mlp.down_proj.weight)
    weight[:, kept] = (mlp.down_proj.weight.double() @ mixed).to(weight)
    mlp.down_proj.weight.copy_(weight)


def _choose_pairs(attention: Any, config: Any, group: int, inputs: Tensor, pairs: int) -> None:
    """The pairs that rotary positions turn, of most E‖q‖² E‖k‖², for all queries of a key head; the others are zero."""
    queries, keys = _rows(config, group)
    energies = []
    for weight, rows in ((attention.q_proj.weight, queries), (attention.k_proj.weight, keys)):
        own = weight[rows].double()
        energy = ((own @ inputs) * own).sum(dim=1).view(-1, 2, config.head_dim // 2)  # a pair is i and i + d/2
        energies.append(energy.sum(dim=(0, 1)))
    gone = torch.ones(config.head_dim // 2, dtype=torch.bool)
    gone[(energies[0] * energies[1]).topk(pairs).indices] = False
    for weight, rows in ((attention.q_proj.weight, queries), (attention.k_proj.weight, keys)):
        mask = gone.repeat(2 * (rows.stop - rows.start) // config.head_dim)
        weight[rows] = weight[rows].masked_fill(mask[:, None], 0)


def _join_values(attention: Any, config: Any, group: int, inputs: Tensor, width: int) -> None:
    """The best product of rank `width` of a value head and what all heads that read it give, over the inputs."""
    queries, keys = _rows(config, group)
    output = attention.o_proj.weight
    stacked = output[:, queries].unflatten(1, (-1, config.head_dim)).transpose(0, 1).flatten(0, 1)  # [heads · out, d]
    product = stacked.double() @ attention.v_proj.weight[keys].double()
    factors = Scaled(Scaling(), whitening(inputs, ACTIVATION_DAMPING)).factorize(product, width)
    values, outputs = (torch.zeros_like(part) for part in (attention.v_proj.weight[keys], stacked))
    values[:width], outputs[:, :width] = factors.down.to(values), factors.up.to(outputs)
    attention.v_proj.weight[keys] = values
    output[:, queries] = outputs.unflatten(0, (-1, len(output))).transpose(0, 1).flatten(1)


def _rows(config: Any, group: int) -> tuple[slice, slice]:
    """Those of the queries that share a key and value head, and of that head."""
    width, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    return slice(group * shared * width, (group + 1) * shared * width), slice(group * width, (group + 1) * width)
