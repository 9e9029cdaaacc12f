"""How much of the arithmetic that low rank saves is saved in time, over the number of tokens at once."""

import torch
from torch import nn

from benchmarks.harness import Options, Result, Row, alternate, milliseconds, ratio, repeats_for, steady_clock
from hf_lowrank import LowRankLinear
from hf_lowrank.nn.layers_lowrank import InterpolativeLinear

SHAPES = ((384, 384), (384, 1536), (768, 768), (768, 3072))
TOKENS = (1, 16, 128, 1024)
RANK_RATIO, ALIGN = 0.33, 8


@torch.inference_mode()
def run(options: Options) -> Result:
    """Speed of `LowRankLinear` relative to `nn.Linear`."""
    measured = [
        _measure(*shape, rank, tokens, options.rounds)
        for shape in SHAPES
        for rank in dict.fromkeys((_rank(shape, 1), _rank(shape, ALIGN)))
        for tokens in TOKENS
    ]
    clock = "the thread's CPU time" if torch.get_num_threads() == 1 else "wall time"
    notes = [
        f"Share realised: the speed-up divided by the ratio of multiplications. Float32, with bias; {clock}. "
        f"Ranks as the ratio gives them, and rounded to the nearest multiple of {ALIGN}. Last, the interpolative form "
        "of the same rank, and its parameters over those of two factors."
    ]
    return Result(
        f"layer: nn.Linear against LowRankLinear, rank ratio {RANK_RATIO}",
        [row for row, _ in measured],
        notes,
        {"cases": [figures for _, figures in measured]},
    )


def _rank(shape: tuple[int, int], align: int) -> int:
    return align * round(RANK_RATIO * min(shape) / align)


def _measure(in_features: int, out_features: int, rank: int, tokens: int, rounds: int) -> tuple[Row, dict]:
    shape = (in_features, out_features)
    dense, low_rank, minimal = nn.Linear(*shape), LowRankLinear(*shape, rank), InterpolativeLinear(*shape, rank)
    x = torch.randn(tokens, in_features)
    competitors = {"dense": lambda: dense(x), "low": lambda: low_rank(x), "interpolative": lambda: minimal(x)}
    seconds = alternate(competitors, rounds, repeats_for(competitors["dense"]), steady_clock())
    speedup = ratio(seconds["dense"], seconds["low"])
    arithmetic = in_features * out_features / (rank * (in_features + out_features))
    row = {
        "in→out": f"{in_features}→{out_features}",
        "rank": str(rank),
        "tokens": str(tokens),
        "dense, ms": milliseconds(seconds["dense"]),
        "low rank, ms": milliseconds(seconds["low"]),
        "speed-up": speedup.text(),
        "arithmetic": f"{arithmetic:.2f}",
        "share realised": f"{speedup.median / arithmetic:.0%}",
        "interpolative, speed-up": ratio(seconds["dense"], seconds["interpolative"]).text(),
        "parameters of factors": f"{minimal.num_parameters() / low_rank.num_parameters():.0%}",
    }
    return row, {"in": in_features, "out": out_features, "rank": rank, "tokens": tokens, "seconds": seconds}
