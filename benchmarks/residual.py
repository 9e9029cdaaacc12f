"""Low rank as what rounding lost, W ≈ Q(W) + U D, against low rank alone, at equal bytes of the linear layers.

Dettmers & Zettlemoyer (2023) call Q(W) + U D a rounded model with adapters; LQER (Zhang et al., 2024), CALDERA (Saha et
al., 2024) and EoRA (Liu et al., 2024) find U D in closed form. Here both forms minimise the same objective, that of
kfac, in rounding as well, and biases make up for the mean. Weights take the values that they would have.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Lines, Options, Result, Row
from hf_lowrank import CompressionConfig
from hf_lowrank.allocation.stored import group_of
from hf_lowrank.compression.codes import coded, solver_for_codes
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.errors import LowRankError
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.layers_lowrank import LowRankLinear
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.solvers.rounded_factors import Grids, round_factors, round_weight
from hf_lowrank.solvers.rounding import Grid
from hf_lowrank.statistics import Statistics
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.evaluate import evaluate_splits

BASES = (2, 3, 4)  # bits of Q(W)
RANKS = (0, 8, 32)  # of U D, in 8 bits
COMPARED = 512  # validation rows on which predictions are compared
ONE_SHOT = CompressionConfig(sequential=False)


def run(options: Options) -> Result:
    """Both forms: the sum at each base and rank, low rank of 4 bits at as many bytes; rows that a file has stay."""
    if options.model is None or options.task is None:
        raise LowRankError("residual needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    pipeline = Pipeline.load(options.model, options.task, options.data_dir, seed=options.seed, progress=False)
    options.output.mkdir(parents=True, exist_ok=True)
    lines = Lines(options.output / f"{Path(options.model).name}_residual.jsonl")
    statistics = pipeline.statistics(ONE_SHOT)
    assert statistics is not None
    solver = solver_for_codes(pipeline.model, "kfac", statistics)
    row = _rows(pipeline)
    for bits in BASES:
        for rank in RANKS:
            known = {"bits": bits, "rank": rank, "seed": options.seed}
            if lines.has(**known):
                continue
            model = copy.deepcopy(pipeline.model)
            size = sum(_corrected(name, model.get_submodule(name), solver, bits, rank) for name in solver.targets)
            other = _low_rank(pipeline, statistics, size)
            lines.add(**known, bytes=size, corrected=row(model), low_rank=row(other))
    return Result(
        f"Q(W) + U D against low rank at equal bytes, {Path(options.model).name}",
        [_row(line) for line in lines.rows() if line["seed"] == options.seed],
        [
            f"Dense: {row(pipeline.model)['score']:.2f}. Score on the whole validation set, divergence on the first "
            f"{COMPARED} rows, no fine-tuning. MB: of linear layers. Factors of one shot, as corrections are."
        ],
    )


def _row(line: dict[str, Any]) -> Row:
    row = {"base": f"{line['bits']} bits", "rank": str(line["rank"]), "MB": f"{line['bytes'] / 1e6:.2f}"}
    for form, name in (("corrected", "Q(W) + U D"), ("low_rank", "low rank, 4 bits")):
        row |= {name: f"{line[form]['score']:.2f}", f"{name}, divergence": f"{line[form]['divergence']:.4f}"}
    return row


def _rows(pipeline: Pipeline) -> Callable[[nn.Module], dict[str, float]]:
    """What says of a form its score, and how far its predictions are from the dense model's."""
    compared = [rows.select(range(min(COMPARED, len(rows)))) for rows in pipeline.validation]
    reference = Reference(pipeline.model, *pipeline.reading, compared)

    def row(model: Any) -> dict[str, float]:
        score = evaluate_splits(model, *pipeline.reading, pipeline.validation, progress=False)["score"]
        return {"score": score, "divergence": reference.divergence(model, progress=False).mean}

    return row


@torch.no_grad()
def _corrected(name: str, linear: Any, solver: LayerSolver, bits: int, rank: int) -> float:
    """Round a layer and add the best correction of a rank, in place; returns its bytes."""
    weight, sides = linear.weight.double(), solver.sides(name, linear.weight.device)
    changed = round_weight(weight, sides, _grid(weight, bits)).weight()
    size = _bytes(weight, bits)
    if rank:
        lost = sides.factorize(weight - changed, rank)
        factors = round_factors(lost, sides, Grids(Grid(8), Grid(8))).factors
        changed = changed + factors.product()
        size += _bytes(factors.up, 8) + _bytes(factors.down, 8)
    mean = solver.mean_input(name)
    if mean is not None:
        linear.bias.add_(((weight - changed) @ mean).to(linear.bias))
    linear.weight.copy_(changed)
    return size


@torch.no_grad()
def _low_rank(pipeline: Pipeline, statistics: Statistics, size: float) -> nn.Module:
    """The model at ranks whose factors have this many bytes in 4 bits, rounded."""
    dense = sum(target.module.weight.numel() for target in find_targets(pipeline.model).values())
    candidate = pipeline.candidate()
    keep = min(1.0, size / (dense * (4 + 16 / 32) / 8))
    candidate.compress(replace(ONE_SHOT, rank_ratio=None, keep=keep, align=32), statistics)
    model: Any = candidate.model
    solver = solver_for_codes(model, "kfac", statistics)
    parts = [
        (f"{name}.{part}" if part else name)
        for name in solver.targets
        for part in (("up", "down") if isinstance(model.get_submodule(name), LowRankLinear) else ("",))
    ]
    grids = {name: _grid(model.get_submodule(name).weight, 4) for name in parts}
    for name, rounded in coded(model, solver, grids).items():
        model.get_submodule(name).weight.copy_(rounded.weight())
    return model


def _grid(weight: Tensor, bits: int) -> Grid:
    return Grid(bits, group_of(weight.shape[1], bits), clipped=True)


def _bytes(weight: Tensor, bits: int) -> float:
    return weight.numel() * bits / 8 + weight.numel() / (group_of(weight.shape[1], bits) or weight.shape[1]) * 2
