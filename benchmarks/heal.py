"""What healing gives back: scores and divergence of compressed models before and after it, over seeds, and its cost."""

import time
from pathlib import Path

from benchmarks.harness import Options, Result, Row
from hf_lowrank import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.tasks import load_split

RATIOS, SEEDS = (0.33, 0.2, 0.1), (0, 1, 2)


def run(options: Options) -> Result:
    """A row for each rank ratio and seed: the default method, then `heal` with its defaults, no label read by it."""
    if options.model is None or options.task is None:
        raise LowRankError("heal needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    rows: list[Row] = []
    dense = Pipeline.load(options.model, options.task, options.data_dir)
    best = dense.score()["score"]
    assert dense.task is not None
    training = len(load_split(dense.task, "train", options.data_dir))
    for seed in SEEDS:
        statistics = None
        for ratio in RATIOS:
            pipeline = Pipeline.load(options.model, options.task, options.data_dir, seed=seed)
            config = CompressionConfig(rank_ratio=ratio)
            statistics = statistics or pipeline.statistics(config)
            pipeline.compress(config, statistics)
            before = pipeline.score()["score"]
            started = time.process_time()
            facts = pipeline.heal(dense.model, seed=seed)
            minutes = (time.process_time() - started) / 60
            after = pipeline.score()["score"]
            rows.append(
                {
                    "ranks": f"{ratio:.0%}",
                    "seed": str(seed),
                    "compressed": f"{before:.2f}",
                    "healed": f"{after:.2f}",
                    "nats from dense, held-out": f"{facts['divergence_before']:.4f} → {facts['divergence_after']:.4f}",
                    "rate": f"{facts['learning_rate']:g}",
                    "texts seen / an epoch's": f"{facts['samples'] * facts['settings']['epochs'] / training:.2f}",
                    "CPU minutes": f"{minutes:.1f}",
                }
            )
    return Result(
        f"{dense.task.score} on {dense.task.name} before and after healing; dense {best:.2f}",
        rows,
        ["No label is read by the healing; the rates tried and all measurements are in the minutes."],
        {"model": Path(options.model).name, "task": dense.task.name, "dense": best},
    )
