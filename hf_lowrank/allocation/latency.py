"""The time that a layer takes at a rank, measured on this machine."""

import statistics
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from hf_lowrank.allocation.costs import Cost, Shape
from hf_lowrank.jobs.distributed import on_main

# Time is measured for this many tokens at once, at this many ranks from small to break-even, and interpolated.
LATENCY_TOKENS, LATENCY_RANKS, LATENCY_REPEATS = 512, 8, 7


def measured_latency(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> Cost:
    """Seconds that `LATENCY_TOKENS` tokens take through a layer, measured once for every shape, by the main process.

    Times of factors are medians at a few ranks, made to never fall with the rank, and linear in between.
    """
    curves = on_main(lambda: {shape: _curve(shape, dtype, device) for shape in dict.fromkeys(shapes)})

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
