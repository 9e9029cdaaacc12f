"""The truncated SVD behind every closed-form method, against the full and the randomised one of PyTorch."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Options, Result, Row, alternate, milliseconds, ratio
from benchmarks.models import random_weight
from hf_lowrank.solvers.scaled import truncated_svd

SHAPES = ((384, 384), (384, 1536), (768, 768), (768, 3072))
RANK_RATIO = 0.33


def run(options: Options) -> Result:
    """Time and error of three truncated SVDs at a third of the rank."""
    measured = [_measure(rows, columns, options.rounds) for rows, columns in SHAPES]
    notes = ["Excess: relative excess of the squared error over the least possible one (full SVD in float64)."]
    return Result(
        f"truncated_svd: full SVD of PyTorch against ours, rank ratio {RANK_RATIO}",
        [row for row, _ in measured],
        notes,
        {"shapes": [figures for _, figures in measured]},
    )


def full_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The textbook way: all singular values, then cut."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def randomised_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`torch.svd_lowrank` at its default settings, with no oversampling."""
    u, s, v = torch.svd_lowrank(matrix, q=rank)
    return u * s, v.T


def _measure(rows: int, columns: int, rounds: int) -> tuple[Row, dict]:
    matrix, rank = random_weight(rows, columns), round(RANK_RATIO * min(rows, columns))
    ways = {"ours": truncated_svd, "full": full_svd, "randomised": randomised_svd}
    seconds = alternate({name: partial(way, matrix, rank) for name, way in ways.items()}, rounds)
    least = float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())
    excess = {name: _squared_error(matrix, *way(matrix, rank)) / least - 1 for name, way in ways.items()}
    speedup = ratio(seconds["full"], seconds["ours"])
    row = {
        "shape": f"{rows}×{columns}",
        "rank": str(rank),
        "ours, ms": milliseconds(seconds["ours"]),
        "full, ms": milliseconds(seconds["full"]),
        "randomised, ms": milliseconds(seconds["randomised"]),
        "full / ours": speedup.text(),
        "randomised / ours": ratio(seconds["randomised"], seconds["ours"]).text(),
        "excess: ours": f"{excess['ours']:.1e}",
        "full": f"{excess['full']:.1e}",
        "randomised": f"{excess['randomised']:.1e}",
    }
    return row, {"shape": [rows, columns], "rank": rank, "seconds": seconds, "excess": excess}


def _squared_error(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    return float((matrix.double() - up.double() @ down.double()).square().sum())
