"""What a layer costs at a rank, in parameters or arithmetic; in time measured on this machine, see `latency.py`."""

from collections.abc import Callable

from hf_lowrank.errors import LowRankError

Shape = tuple[int, int]  # (out, in)
Cost = Callable[[Shape, int | None], float]  # rank None: dense


def parameters(shape: Shape, rank: int | None) -> int:
    """The parameters of a layer's weight [out, in], or of its two factors."""
    return shape[0] * shape[1] if rank is None else rank * sum(shape)


def minimal_parameters(shape: Shape, rank: int | None) -> int:
    """The parameters of a layer in interpolative form: the dimension of the matrices of its rank."""
    return shape[0] * shape[1] if rank is None else rank * (sum(shape) - rank)


def parameters_at(shape: Shape, rank: int) -> int:
    """The parameters of a layer [out, in] at a rank: dense, where that is fewer."""
    return min(parameters(shape, rank), parameters(shape, None))


def saves_parameters(shape: Shape, rank: int) -> bool:
    """Whether two factors of this rank have fewer parameters than the dense weight [out, in]."""
    return parameters(shape, rank) < parameters(shape, None)


def flops(shape: Shape, rank: int | None) -> int:
    """The floating-point operations of one token through a layer: a multiplication and an addition per parameter."""
    return 2 * parameters(shape, rank)


def in_interpolative_form(cost: Cost) -> Cost:
    """The cost, `parameters` or `flops`, of layers in interpolative form.

    Raises:
        LowRankError: another cost, as latency is measured of plain factors.
    """
    if cost not in (parameters, flops):
        raise LowRankError("a latency budget is for plain factors: give another budget with the interpolative form")
    per_parameter = 1 if cost is parameters else 2
    return lambda shape, rank: per_parameter * minimal_parameters(shape, rank)
