"""What a layer costs at a rank, in parameters, arithmetic, or time measured on this machine."""

import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from hf_lowrank.errors import LowRankError

Shape = tuple[int, int]  # (out, in)
Cost = Callable[[Shape, int | None], float]  # rank None: dense

# Time is measured for this many tokens at once, at this many ranks from small to break-even, and interpolated.
LATENCY_TOKENS, LATENCY_RANKS, LATENCY_REPEATS = 512, 8, 7


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


def measured_latency(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> Cost:
    """Seconds that `LATENCY_TOKENS` tokens take through a layer, measured here once for every shape.

    Times of factors are medians at a few ranks, made to never fall with the rank, and linear in between.
    """
    curves = {shape: _curve(shape, dtype, device) for shape in dict.fromkeys(shapes)}

    def cost(shape: Shape, rank: int | None) -> float:
        ranks, seconds, dense = curves[shape]
        return dense if rank is None else float(np.interp(rank, ranks, seconds))

    return cost


def _curve(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[int], list[float], float]:
    out_features, in_features = shape
    ranks = sorted({max(1, round(min(shape) * n / LATENCY_RANKS)) for n in range(LATENCY_RANKS + 1)})
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    layers += [nn.Sequential(nn.Linear(in_features, r, bias=False), nn.Linear(r, out_features)) for r in ranks]
    x = torch.randn(LATENCY_TOKENS, in_features, dtype=dtype, device=device)
    dense, *seconds = _alternate([layer.to(device, dtype).eval() for layer in layers], x)
    return ranks, np.maximum.accumulate(seconds).tolist(), dense


@torch.inference_mode()
def _alternate(layers: list[nn.Module], x: torch.Tensor) -> list[float]:
    """The median time of each layer, taken in turn so that all meet the same conditions."""
    times: list[list[float]] = [[] for _ in layers]
    for _ in range(LATENCY_REPEATS + 1):
        for layer, seen in zip(layers, times, strict=True):
            started = time.perf_counter()
            layer(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            seen.append(time.perf_counter() - started)
    return [statistics.median(seen[1:]) for seen in times]
