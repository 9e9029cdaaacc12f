"""Two blocks of BERT-base's shape, dense and low-rank: as they are, by torch.compile, and with packed weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config as inductor

from benchmarks.harness import Options, Result, Row, alternate, milliseconds, ratio, repeats_for, steady_clock
from benchmarks.model_speed import ALIGN, RANK_RATIO, low_rank_copy
from benchmarks.models import random_bert
from hf_lowrank.studies.bench.measure import operations

SHAPES = ((32, 128), (1, 128), (1, 16))  # batch × tokens
MODES = ("eager", "compiled", "packed")


@torch.no_grad()
def run(options: Options) -> Result:
    """The speed of both models in every mode, and the share of the arithmetic ratio realised within each mode."""
    dense = random_bert(2, 768)
    models = {"dense": dense, "low rank": low_rank_copy(dense, ALIGN)}
    rows: list[Row] = []
    for shape in SHAPES:
        ids = torch.randint(1000, shape, generator=torch.Generator().manual_seed(0))
        arithmetic = operations(_call(models["dense"], ids)) / operations(_call(models["low rank"], ids))
        for mode in MODES:
            torch._dynamo.reset()  # the code of the mode before
            calls = {which: _ready(model, mode, ids) for which, model in models.items()}
            seconds = alternate(calls, options.rounds, repeats_for(calls["dense"]), steady_clock())
            speedup = ratio(seconds["dense"], seconds["low rank"])
            rows.append(
                {
                    "batch × tokens": f"{shape[0]} × {shape[1]}",
                    "mode": mode,
                    "dense, ms": milliseconds(seconds["dense"]),
                    "low rank, ms": milliseconds(seconds["low rank"]),
                    "speed-up": speedup.text(),
                    "arithmetic": f"{arithmetic:.2f}",
                    "share realised": f"{speedup.median / arithmetic:.0%}",
                }
            )
    note = f"Float32, {torch.get_num_threads()} threads, rank ratio {RANK_RATIO} in multiples of {ALIGN}. Packed: "
    note += "torch.compile with `torch._inductor.config.freezing`, which lays weights out for oneDNN beforehand."
    return Result("compiled: two blocks of BERT-base's shape", rows, [note])


def _ready(model: Any, mode: str, ids: torch.Tensor) -> Callable[[], Any]:
    """A call of the model in a mode, compiled already."""
    if mode == "eager":
        return _call(model, ids)
    with _freezing(mode == "packed"):
        call = _call(torch.compile(model, dynamic=False), ids)
        call()
    return call


def _call(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    mask = torch.ones_like(ids)
    return lambda: model(input_ids=ids, attention_mask=mask)


@contextmanager
def _freezing(on: bool) -> Iterator[None]:
    before, inductor.freezing = inductor.freezing, on
    try:
        yield
    finally:
        inductor.freezing = before
