"""Layers → the time that each takes at a rank, measured on this machine."""

import statistics
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from hf_lowrank.allocation import Budget, Layer
from hf_lowrank.allocation.costs import ONCE, Cost, Shape, Uses
from hf_lowrank.jobs.distributed import on_main
from hf_lowrank.jobs.turns import seconds_in_turns
from hf_lowrank.model.targets import Target

# Time is measured for this many tokens at once, at this many ranks from small to break-even, and interpolated.
LATENCY_TOKENS, LATENCY_RANKS, LATENCY_REPEATS = 512, 8, 7


def latency_for(budget: Budget, targets: Mapping[str, Target], layers: Mapping[str, Layer]) -> Cost | None:
    """The measured time of the targets, for a budget of it: in the dtype and on the device of the first one."""
    if budget.kind != "latency":
        return None
    first = next(next(iter(targets.values())).module.parameters())
    return measured_latency(layers.values(), first.dtype, first.device)


def measured_latency(layers: Iterable[Layer], dtype: torch.dtype, device: torch.device) -> Cost:
    """Seconds that `LATENCY_TOKENS` tokens take through a layer, measured once for every shape, by the main process.

    Times of factors are medians at a few ranks, made to never fall with the rank, and linear in between. Every use is
    counted: the product with an embedding's weight is that of a head which is tied to it.
    """
    kinds = dict.fromkeys(kind for layer in layers for kind, _ in _kinds(layer.shape, layer.uses))
    curves = on_main(lambda: {kind: _curve(kind, dtype, device) for kind in kinds})

    def cost(shape: Shape, rank: int | None, uses: Uses = ONCE) -> float:
        return sum(times * _seconds(curves[kind], rank) for kind, times in _kinds(shape, uses))

    return cost


Kind = tuple[type[nn.Module], int, int]  # of a layer, in, out
Curve = tuple[list[int], list[float], float]  # ranks, their seconds, those of the dense layer


def _kinds(shape: Shape, uses: Uses) -> list[tuple[Kind, int]]:
    """What is timed of a layer, and how often it takes place."""
    out_features, in_features = shape if not uses.lookups else (shape[1], shape[0])
    kinds: list[tuple[Kind, int]] = [((nn.Linear, in_features, out_features), uses.products)]
    kinds += [((nn.Embedding, out_features, in_features), uses.lookups)]
    return [(kind, times) for kind, times in kinds if times]


def _seconds(curve: Curve, rank: int | None) -> float:
    ranks, seconds, dense = curve
    return dense if rank is None else float(np.interp(rank, ranks, seconds))


def _curve(kind: Kind, dtype: torch.dtype, device: torch.device) -> Curve:
    layer, first, last = kind
    ranks = sorted({max(1, round(min(first, last) * n / LATENCY_RANKS)) for n in range(LATENCY_RANKS + 1)})
    options: dict = {"bias": False} if layer is nn.Linear else {}
    layers: list[nn.Module] = [layer(first, last)]
    layers += [nn.Sequential(layer(first, r, **options), nn.Linear(r, last)) for r in ranks]
    x = torch.randn(LATENCY_TOKENS, first, dtype=dtype, device=device)
    if layer is nn.Embedding:
        x = torch.randint(first, (LATENCY_TOKENS,), device=device)
    dense, *seconds = _alternate([layer.to(device, dtype).eval() for layer in layers], x)
    return ranks, np.maximum.accumulate(seconds).tolist(), dense


@torch.inference_mode()
def _alternate(layers: list[nn.Module], x: torch.Tensor) -> list[float]:
    """The median time of each layer, taken in turn so that all meet the same conditions."""
    calls = {number: partial(layer, x) for number, layer in enumerate(layers)}
    return [statistics.median(seen) for seen in seconds_in_turns(calls, LATENCY_REPEATS, x.device).values()]
