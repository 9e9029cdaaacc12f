"""Low rank as what rounding lost, W ≈ Q(W) + U D, against low rank alone, at equal bytes of the linear layers.

Dettmers & Zettlemoyer (2023) call Q(W) + U D a rounded model with adapters; LQER (Zhang et al., 2024), CALDERA (Saha et
al., 2024) and EoRA (Liu et al., 2024) find U D in closed form. Here both forms minimise the same objective, that of
kfac. Rounding is simulated: weights take the values that they would have.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Result, Row
from hf_lowrank import CompressionConfig, compress
from hf_lowrank.allocation.stored import group_of
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.packing import rounded
from hf_lowrank.model.targets import find_targets
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.solvers import get_method
from hf_lowrank.training.evaluate import evaluate_splits

BASES = (2, 3, 4)  # bits of Q(W)
RANKS = (8, 32)  # of U D, in 8 bits


def run(options: Options) -> Result:
    """Scores of both forms, the sum at each base and rank, low rank of 4 bits at as many bytes."""
    if options.model is None or options.task is None:
        raise LowRankError("residual needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    pipeline = Pipeline.load(options.model, options.task, options.data_dir, seed=options.seed, progress=False)
    statistics = pipeline.measure(CompressionConfig().needs)
    means = {name: {k: statistics.mean(k, name) for k in statistics.kinds} for name in find_targets(pipeline.model)}
    rows = [_row("dense", None, pipeline)]
    for bits in BASES:
        for rank in (0, *RANKS):
            model = copy.deepcopy(pipeline.model)
            size = sum(_corrected(model.get_submodule(name), means[name], bits, rank) for name in means)
            rows.append(_row(f"{bits} bits + rank {rank}", size, pipeline, model))
            rows.append(_row("low rank, 4 bits", size, pipeline, _low_rank(pipeline, statistics, size)))
    return Result(
        f"Q(W) + U D against low rank at equal bytes, {Path(options.model).name}",
        rows,
        ["Whole validation set, no fine-tuning. MB are of the linear layers of the blocks, scales included."],
    )


@torch.no_grad()
def _corrected(linear: nn.Linear, means: dict[str, Tensor], bits: int, rank: int) -> float:
    """Round a layer and add the best correction of a rank, in place; returns its bytes."""
    weight = linear.weight.float()
    base = rounded(weight, bits)
    size = _bytes(weight, bits)
    if rank:
        factors = get_method("kfac").objective(means).factorize(weight - base, rank).balanced()
        up, down = (factor.float().contiguous() for factor in (factors.up, factors.down))
        base = base + rounded(up, 8) @ rounded(down, 8)
        size += _bytes(up, 8) + _bytes(down, 8)
    linear.weight.copy_(base)
    return size


@torch.no_grad()
def _low_rank(pipeline: Pipeline, statistics: object, size: float) -> nn.Module:
    """The model at ranks whose factors have this many bytes in 4 bits, rounded."""
    dense = sum(linear.weight.numel() for linear in _linears(pipeline.model))
    keep = min(1.0, size / (dense * (4 + 16 / 32) / 8))
    config = CompressionConfig(keep=keep, align=32)
    model, _ = compress(copy.deepcopy(pipeline.model), config, statistics, progress=False)
    for layer in model.factorized_layers().values():
        for factor in layer.linear_factors():
            factor.weight.copy_(rounded(factor.weight, 4))
    for linear in _linears(model):
        linear.weight.copy_(rounded(linear.weight, 4))
    return model


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    """Those that are targets and dense."""
    try:
        names = [*find_targets(model)]
    except LowRankError:
        return
    yield from (layer for name in names if type(layer := model.get_submodule(name)) is nn.Linear)


def _bytes(weight: Tensor, bits: int) -> float:
    return weight.numel() * bits / 8 + weight.numel() / (group_of(weight.shape[1], bits) or weight.shape[1]) * 2


def _row(form: str, size: float | None, pipeline: Pipeline, model: nn.Module | None = None) -> Row:
    score = evaluate_splits(model or pipeline.model, *pipeline.reading, pipeline.validation, progress=False)["score"]
    return {"form": form, "MB": "" if size is None else f"{size / 1e6:.2f}", "score": f"{score:.2f}"}
