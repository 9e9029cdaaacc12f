"""Dotted module names → the block a layer is in, and its type: what it is called within the block."""

from typing import NamedTuple


class Place(NamedTuple):
    """`block` is the first number in a name, None outside of blocks; `before` and `within` are what surrounds it."""

    block: int | None
    before: tuple[str, ...]
    within: str


def place_of(name: str) -> Place:
    """Where a layer stands.

    >>> place_of("bert.encoder.layer.3.attention.self.query")
    Place(block=3, before=('bert', 'encoder', 'layer'), within='attention.self.query')
    >>> place_of("bert.pooler.dense")
    Place(block=None, before=(), within='bert.pooler.dense')
    """
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return Place(None, (), name)
    return Place(int(parts[at]), tuple(parts[:at]), ".".join(parts[at + 1 :]))


def kind_of(name: str) -> str:
    """What a layer is called within its block, all experts alike.

    >>> kind_of("model.layers.0.mlp.experts.down_proj.3")
    'mlp.experts.down_proj'
    """
    within = place_of(name).within
    return within.rpartition(".")[0] if is_expert_layer(within) else within


def is_expert_layer(name: str) -> bool:
    """Whether it is a layer of experts whose weights are, or were, stacked in 3-D parameters.

    >>> is_expert_layer("model.layers.0.mlp.experts.down_proj.3"), is_expert_layer("model.layers.0.mlp.down_proj")
    (True, False)
    """
    projection, _, number = name.rpartition(".")
    return number.isdigit() and projection.endswith((".gate_up_proj", ".up_proj", ".down_proj"))
