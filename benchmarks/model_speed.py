"""Whole encoders, dense and low-rank, at ranks as they come and at multiples of 8: where the saved arithmetic goes."""

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.harness import Options, Result, Row, alternate, ratio, steady_clock
from benchmarks.models import random_bert
from hf_lowrank import LowRankLinear
from hf_lowrank.compression.forms import to_form
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.nn.modeling_lowrank import to_low_rank_class
from hf_lowrank.studies.bench.measure import operations

SHAPES = {"MiniLM-L6": (6, 384), "BERT-base": (12, 768)}
BATCH, LENGTH = 32, 128
RANK_RATIO, ALIGN = 0.33, 8


@torch.inference_mode()
def run(options: Options) -> Result:
    """Speed of the low-rank encoder relative to the dense one, and the share of its arithmetic ratio."""
    measured = [_measure(name, *shape, options.rounds) for name, shape in SHAPES.items()]
    clock = "the thread's CPU time" if torch.get_num_threads() == 1 else "wall time"
    return Result(
        f"model_speed: encoders at batch {BATCH} × {LENGTH} tokens, rank ratio {RANK_RATIO}",
        [row for rows, _ in measured for row in rows],
        [
            f"Random weights, float32, {torch.get_num_threads()} threads, {clock}; arithmetic with attention. "
            f"Aligned: ranks rounded to the nearest multiple of {ALIGN}."
        ],
        {"cases": [figures for _, figures in measured]},
    )


def _measure(name: str, layers: int, hidden: int, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    dense = random_bert(layers, hidden)
    models = {"dense": dense, "as it comes": low_rank_copy(dense, 1), "aligned": low_rank_copy(dense, ALIGN)}
    models["aligned, interpolative"] = to_form(low_rank_copy(dense, ALIGN), "interpolative")
    ids = torch.randint(1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    calls = {which: _call(model, ids) for which, model in models.items()}
    counts = {which: operations(call) for which, call in calls.items()}
    seconds = alternate(calls, rounds, clock=steady_clock())
    rows = []
    for which in list(models)[1:]:
        speedup = ratio(seconds["dense"], seconds[which])
        arithmetic = counts["dense"] / counts[which]
        ranks = sorted({m.rank for m in models[which].modules() if isinstance(m, LowRankLinear)})
        rows.append(
            {
                "encoder": name,
                "ranks": f"{which} ({', '.join(map(str, ranks))})",
                "dense, ms": f"{1000 * statistics.median(seconds['dense']):.0f}",
                "low rank, ms": f"{1000 * statistics.median(seconds[which]):.0f}",
                "speed-up": speedup.text(),
                "arithmetic": f"{arithmetic:.2f}",
                "share realised": f"{speedup.median / arithmetic:.0%}",
            }
        )
    return rows, {"encoder": name, "operations": counts, "seconds": seconds}


def _call(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    mask = torch.ones_like(ids)
    return lambda: model(input_ids=ids, attention_mask=mask)


def low_rank_copy(dense: PreTrainedModel, align: int) -> PreTrainedModel:
    """A copy with all linears of the blocks at `RANK_RATIO`, rounded to a multiple of `align`; random factors."""
    model = to_low_rank_class(copy.deepcopy(dense))
    for name, target in find_targets(model).items():
        rank = max(1, round(RANK_RATIO * min(target.shape) / align)) * align
        replace_module(model, name, LowRankLinear.like(target.module, rank))
    return model.eval()
