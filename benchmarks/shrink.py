"""A compressed model cut further without data, against compressing the dense one anew: scores, divergence, seconds.

The larger models and the smaller ones made anew are those of the benchmark `heal`, in its folder.
"""

from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Result, Row, mean_of
from benchmarks.heal import SEEDS, Study, cpu_seconds
from hf_lowrank import shrink_saved
from hf_lowrank.errors import LowRankError
from hf_lowrank.pipeline import Pipeline

PAIRS = ((0.2, 0.1), (0.33, 0.2), (0.33, 0.1))  # shares of the ranks, before and after


def run(options: Options) -> Result:
    """A row for each pair: the default method behind the prefix, anew and shrunk from a larger model."""
    if options.model is None or options.task is None:
        raise LowRankError("shrink needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    study = Study(options, options.model, options.task)
    for seed in SEEDS:
        for large, small in PAIRS:
            study.compressed(large, seed)
            study.compressed(small, seed)
            _shrunk(study, large, small, seed)
    rows, dense = study.lines.rows(), study.dense()
    return Result(
        f"{study.task}: cut further without data, and compressed anew; dense {dense:.2f}",
        [_row(rows, *pair) for pair in PAIRS],
        ["Mean over the seeds, before healing. Nats: how far from the dense model on the validation data."],
        {"model": Path(options.model).name, "task": study.task, "dense": dense, "rows": rows},
    )


def _shrunk(study: Study, large: float, small: float, seed: int) -> None:
    """Shrink and score, unless that was done."""
    if study.lines.has(step="shrunk", ratio=small, seed=seed, large=large):
        return
    found: list[Any] = []
    seconds = cpu_seconds(lambda: found.extend(shrink_saved(study.place(large, seed), rank_ratio=small)))
    pipeline = Pipeline(found[0], *study.teacher.reading, study.options.data_dir, progress=False)
    study.add("shrunk", small, seed, pipeline, large=large, seconds=seconds)


def _row(rows: list[dict[str, Any]], large: float, small: float) -> Row:
    shrunk = [row for row in rows if row["step"] == "shrunk" and (row["large"], row["ratio"]) == (large, small)]
    anew = [row for row in rows if row["step"] == "compressed" and row["ratio"] == small]
    return {
        "ranks": f"{large:.0%} → {small:.0%}",
        "seeds": str(len(shrunk)),
        "anew": mean_of([row["score"] for row in anew], 2),
        "shrunk": mean_of([row["score"] for row in shrunk], 2),
        "nats, anew": mean_of([row["nats"] for row in anew], 4),
        "nats, shrunk": mean_of([row["nats"] for row in shrunk], 4),
        "CPU seconds, anew": mean_of([row["seconds"] for row in anew], 0),
        "shrunk in": mean_of([row["seconds"] for row in shrunk], 1),
    }
