"""A saved encoder of BERT-base's shape, dense and low-rank → the time to load it, and to have its first output."""

import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.harness import Options, Result, milliseconds, ratio, steady_clock
from benchmarks.model_speed import ALIGN, RANK_RATIO, SHAPES, low_rank_copy
from benchmarks.models import random_bert

ENCODER, TOKENS = "BERT-base", 16


@torch.inference_mode()
def run(options: Options) -> Result:
    """Loading of the low-rank encoder relative to the dense one, files in the system's cache."""
    ids = torch.arange(TOKENS)[None]
    clock = steady_clock()
    seconds: dict[str, dict[str, list[float]]] = {what: {"dense": [], "low rank": []} for what in ("load", "output")}
    with tempfile.TemporaryDirectory() as folder:
        dense = random_bert(*SHAPES[ENCODER])
        dense.save_pretrained(Path(folder, "dense"))
        low_rank_copy(dense, ALIGN).save_pretrained(Path(folder, "low rank"))
        del dense
        for turn in range(options.rounds + 1):
            for which in ("dense", "low rank"):
                started = clock()
                model = AutoModelForSequenceClassification.from_pretrained(Path(folder, which))
                loaded = clock()
                model(input_ids=ids)
                if turn > 0:
                    seconds["load"][which].append(loaded - started)
                    seconds["output"][which].append(clock() - started)
                del model
    rows = [
        {
            "time to": name,
            "dense, ms": milliseconds(seconds[what]["dense"]),
            "low rank, ms": milliseconds(seconds[what]["low rank"]),
            "low rank / dense": ratio(seconds[what]["low rank"], seconds[what]["dense"]).text(),
        }
        for what, name in (("load", "from_pretrained"), ("output", f"its first output, {TOKENS} tokens, with loading"))
    ]
    measured = "the thread's CPU time" if clock is time.thread_time else "wall time"
    note = f"Float32, rank ratio {RANK_RATIO} rounded to multiples of {ALIGN}; {measured}. Weights are mapped when the "
    note += "model is loaded, and read when they are first used."
    return Result(f"loading: {ENCODER}'s shape, dense and low-rank", rows, [note], {"seconds": seconds})
