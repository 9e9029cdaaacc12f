"""A layer as an allocation sees it, and what it costs at a rank, in parameters or arithmetic.

What it costs in time is measured (`hf_lowrank.compression.latency`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from hf_lowrank.errors import LowRankError

Shape = tuple[int, int]  # (out, in)


@dataclass(frozen=True)
class Uses:
    """How often a token passes through a layer: by a product with its weight, and by a lookup in it (an embedding)."""

    products: int = 1
    lookups: int = 0


ONCE = Uses()
PLAIN_ONLY = "a latency budget is for plain factors: give another budget with the interpolative form"
Cost = Callable[[Shape, int | None, Uses], float]  # rank None: dense


@dataclass(frozen=True)
class Layer:
    """All that an allocation knows of a layer.

    Args:
        shape: (out, in) of its weight.
        rank: that it has already, None where it is dense.
        form: that its factors have, if it has any.
        uses: how often a token passes through it.
    """

    shape: Shape
    rank: int | None = None
    form: str = "factors"
    uses: Uses = ONCE


def parameters(shape: Shape, rank: int | None, uses: Uses = ONCE) -> int:
    """The parameters of a layer's weight [out, in], or of its two factors, however often they are used."""
    return shape[0] * shape[1] if rank is None else rank * sum(shape)


def minimal_parameters(shape: Shape, rank: int | None, uses: Uses = ONCE) -> int:
    """The parameters of a layer in interpolative form: the dimension of the matrices of its rank."""
    return shape[0] * shape[1] if rank is None else rank * (sum(shape) - rank)


def parameters_at(shape: Shape, rank: int) -> int:
    """The parameters of a layer [out, in] at a rank: dense, where that is fewer."""
    return min(parameters(shape, rank), parameters(shape, None))


def saves_parameters(shape: Shape, rank: int) -> bool:
    """Whether two factors of this rank have fewer parameters than the dense weight [out, in]."""
    return parameters(shape, rank) < parameters(shape, None)


def flops(shape: Shape, rank: int | None, uses: Uses = ONCE) -> int:
    """The floating-point operations of one token: a multiplication and an addition per parameter of every product.

    A lookup in an embedding [width, tokens] takes none; in a factorized one, r numbers are looked up and widened.
    """
    lookup = 0 if rank is None else rank * shape[0]
    return 2 * (uses.products * parameters(shape, rank) + uses.lookups * lookup)


def minimal_flops(shape: Shape, rank: int | None, uses: Uses = ONCE) -> int:
    """The same of a linear layer in interpolative form."""
    return 2 * uses.products * minimal_parameters(shape, rank)


def in_interpolative_form(cost: Cost) -> Cost:
    """The cost, `parameters` or `flops`, of layers in interpolative form.

    Raises:
        LowRankError: another cost, as latency is measured of plain factors.
    """
    if cost not in (parameters, flops):
        raise LowRankError(PLAIN_ONLY)
    return minimal_parameters if cost is parameters else minimal_flops
