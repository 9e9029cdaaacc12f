"""What healing gives back: scores and divergence of compressed models before and after it, over seeds, and its cost.

Compressed models and rows are kept in the output folder as they come: what ended early goes on there.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.harness import Lines, Options, Result, Row, mean_of
from hf_lowrank import CompressionConfig, Statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.finetune import finetune

RATIOS, SEEDS = (0.1, 0.2, 0.33), (0, 1, 2)
EPOCH = 1 / 32  # of training, timed for what a whole one takes


def run(options: Options) -> Result:
    """A row for each rank ratio: the default method behind the prefix, then `heal` by its defaults, without labels."""
    if options.model is None or options.task is None:
        raise LowRankError("heal needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    study = Study(options, options.model, options.task)
    study.dense()
    study.epoch()
    for seed in SEEDS:
        for ratio in RATIOS:
            study.compressed(ratio, seed)
            study.healed(ratio, seed)
    rows, dense, epoch = study.lines.rows(), study.dense(), study.epoch()
    return Result(
        f"{study.task} before and after healing; dense {dense:.2f}, an epoch of training it {epoch / 60:.1f} minutes",
        [_row(rows, ratio, dense, epoch) for ratio in RATIOS],
        [
            "Mean over the seeds. Nats: how far from the dense model on the validation data. Minutes: of CPU, with the "
            "trials of rates and all measurements; an epoch is one of training the dense model on all rows."
        ],
        {"model": Path(options.model).name, "task": study.task, "dense": dense, "rows": rows},
    )


def _row(rows: list[dict[str, Any]], ratio: float, dense: float, epoch: float) -> Row:
    before, after = (
        [row for row in rows if row["step"] == step and row["ratio"] == ratio] for step in ("compressed", "healed")
    )
    share = mean_of([row["score"] / dense for row in after], 3)
    return {
        "ranks": f"{ratio:.0%}",
        "seeds": str(len(after)),
        "compressed": mean_of([row["score"] for row in before], 2),
        "healed": mean_of([row["score"] for row in after], 2),
        "of dense": share,
        "nats": f"{mean_of([row['nats'] for row in before], 4)} → {mean_of([row['nats'] for row in after], 4)}",
        "rates": ", ".join(sorted({f"{row['rate']:g}" for row in after})),
        "minutes": mean_of([row["seconds"] / 60 for row in after], 1),
        "of an epoch": mean_of([row["seconds"] / epoch for row in after], 2),
    }


@dataclass
class Study:
    """The model, its data, and the rows that there are."""

    options: Options
    model: str
    task: str

    @cached_property
    def folder(self) -> Path:
        """Where models and statistics are kept."""
        folder = self.options.output / f"heal_{Path(self.model).name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def lines(self) -> Lines:
        """The rows."""
        return Lines(self.folder / "rows.jsonl")

    @cached_property
    def teacher(self) -> Pipeline:
        """The dense model."""
        return Pipeline.load(self.model, self.task, self.options.data_dir, progress=False)

    @cached_property
    def reference(self) -> Reference:
        """Its predictions of the validation data."""
        return Reference(self.teacher.model, *self.teacher.reading, self.teacher.validation)

    def dense(self) -> float:
        """Its score."""
        if not self.lines.has(step="dense"):
            self.lines.add(step="dense", score=self.teacher.score()["score"])
        return next(row["score"] for row in self.lines.rows() if row["step"] == "dense")

    def epoch(self) -> float:
        """The CPU seconds of an epoch of training it."""
        if not self.lines.has(step="epoch"):
            self.lines.add(step="epoch", seconds=self._epoch())
        return next(row["seconds"] for row in self.lines.rows() if row["step"] == "epoch")

    def compressed(self, ratio: float, seed: int) -> None:
        """Compress and save, unless that was done."""
        if self.lines.has(step="compressed", ratio=ratio, seed=seed):
            return
        pipeline = Pipeline.load(self.model, self.task, self.options.data_dir, seed=seed, progress=False)
        config = pipeline.prepared(CompressionConfig(rank_ratio=ratio, sequential=True))
        measured = self.folder / f"statistics-{seed}"
        if not measured.is_dir():
            pipeline.save_statistics(_known(pipeline.statistics(config)), measured)
        seconds = cpu_seconds(lambda: pipeline.compress(config, Statistics.load(measured)))
        pipeline.save(self.place(ratio, seed), overwrite=True)
        self.add("compressed", ratio, seed, pipeline, seconds=seconds)

    def healed(self, ratio: float, seed: int) -> None:
        """Heal what was saved, unless that was done."""
        if self.lines.has(step="healed", ratio=ratio, seed=seed):
            return
        pipeline = Pipeline.load(str(self.place(ratio, seed)), self.task, self.options.data_dir, progress=False)
        facts: dict[str, Any] = {}
        seconds = cpu_seconds(lambda: facts.update(pipeline.heal(self.teacher.model, seed=seed)))
        kept = {key: facts[key] for key in ("divergence_before", "divergence_after", "steps", "best_step", "samples")}
        self.add("healed", ratio, seed, pipeline, seconds=seconds, rate=facts["learning_rate"], **kept)

    def add(self, step: str, ratio: float, seed: int, pipeline: Pipeline, **facts: Any) -> None:
        """Score a model and write its row."""
        nats = self.reference.divergence(pipeline.model, progress=False).mean
        self.lines.add(step=step, ratio=ratio, seed=seed, score=pipeline.score()["score"], nats=nats, **facts)

    def place(self, ratio: float, seed: int) -> Path:
        """Where a compressed model is."""
        return self.folder / f"{ratio:g}-{seed}"

    def _epoch(self) -> float:
        """CPU seconds of one, from two short trainings, so that what both begin with does not count."""
        tokenizer, task = self.teacher.reading

        def trained(epochs: float) -> Callable[[], Any]:
            rest: Any = {"epochs": epochs, "score": False, "progress": False}
            model = copy.deepcopy(self.teacher.model)
            return lambda: finetune(model, tokenizer, task, self.options.data_dir, **rest)

        return (cpu_seconds(trained(2 * EPOCH)) - cpu_seconds(trained(EPOCH))) / EPOCH


def cpu_seconds(call: Callable[[], Any]) -> float:
    """What a call takes, of all threads."""
    started = time.process_time()
    call()
    return time.process_time() - started


def _known(statistics: Statistics | None) -> Statistics:
    assert statistics is not None
    return statistics
