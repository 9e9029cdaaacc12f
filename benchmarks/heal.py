"""What healing gives back: scores and divergence of compressed models before and after it, over seeds, and its cost.

Compressed models and rows are kept in the output folder as they come: what ended early goes on there.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.harness import Lines, Options, Result, Row, alternate, mean_of, steady_clock
from hf_lowrank import CompressionConfig, Statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import unlabelled
from hf_lowrank.model.targets import factorized_layers
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.tasks import collator, encode, load_split
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.heal import TRIAL

RATIOS, SEEDS = (0.1, 0.2, 0.33), (0, 1, 2)
BATCH, TIMED = 32, 12  # rows of a step, and steps that are timed


def run(options: Options) -> Result:
    """A row for each rank ratio: the default method behind the prefix, then `heal` by its defaults, without labels."""
    if options.model is None or options.task is None:
        raise LowRankError("heal needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    study = Study(options, options.model, options.task)
    study.dense()
    for seed in SEEDS:
        for ratio in RATIOS:
            study.compressed(ratio, seed)
            study.timed(ratio)
            study.healed(ratio, seed)
    rows, dense = study.lines.rows(), study.dense()
    return Result(
        f"{study.task} before and after healing; dense {dense:.2f}",
        [_row(rows, ratio, dense) for ratio in RATIOS],
        [
            "Mean over the seeds. Nats: how far from the dense model on the validation data. Minutes: of CPU, with the "
            "trials of rates and all measurements. Of an epoch: what the steps of healing, the trials' too, and asking "
            f"the teacher take of an epoch of training the dense model on all rows, by {TIMED} steps of each in turn."
        ],
        {"model": Path(options.model).name, "task": study.task, "dense": dense, "rows": rows},
    )


def _row(rows: list[dict[str, Any]], ratio: float, dense: float) -> Row:
    before, after, timed = (
        [row for row in rows if row["step"] == step and row["ratio"] == ratio]
        for step in ("compressed", "healed", "timed")
    )
    share = mean_of([row["score"] / dense for row in after], 3) if dense else "–"
    return {
        "ranks": f"{ratio:.0%}",
        "seeds": str(len(after)),
        "compressed": mean_of([row["score"] for row in before], 2),
        "healed": mean_of([row["score"] for row in after], 2),
        "of dense": share,
        "nats": f"{mean_of([row['nats'] for row in before], 4)} → {mean_of([row['nats'] for row in after], 4)}",
        "rates": ", ".join(sorted({f"{row['rate']:g}" for row in after})),
        "minutes": mean_of([row["seconds"] / 60 for row in after], 1),
        "of an epoch": mean_of([_of_an_epoch(row, timed[0]) for row in after], 2),
    }


def _of_an_epoch(row: dict[str, Any], timed: dict[str, Any]) -> float:
    """What a healing takes of an epoch of training, by the seconds of their steps."""
    healing = row["all_steps"] * timed["healing"] + row["samples"] / BATCH * timed["asking"]
    return healing / (timed["rows"] / BATCH * timed["training"])


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

    def timed(self, ratio: float) -> None:
        """The CPU seconds of a step of training the dense model, of asking it, and of training factors, in turn."""
        if self.lines.has(step="timed", ratio=ratio):
            return
        tokenizer, task = self.teacher.reading
        rows = load_split(task, "train", self.options.data_dir)
        some = encode(rows.shuffle(seed=0).select(range(min(TIMED * BATCH, len(rows)))), task, tokenizer, self.config)
        loader = DataLoader(some, BATCH, collate_fn=collator(task, tokenizer))
        low_rank = Pipeline.load(str(self.place(ratio, SEEDS[0])), self.task, self.options.data_dir, progress=False)
        competitors = {
            "training": _step(copy.deepcopy(self.teacher.model).train(), loader, False),
            "asking": _asked(copy.deepcopy(self.teacher.model), loader),
            "healing": _step(low_rank.model.eval(), loader, True),
        }
        found = alternate(competitors, TIMED, clock=steady_clock())
        self.lines.add(step="timed", ratio=ratio, rows=len(rows), **{name: fmean(found[name]) for name in found})

    @property
    def config(self) -> Any:
        """The dense model's."""
        return self.teacher.model.config

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
        trial = max(1, round(TRIAL * facts["steps"]))
        kept |= {"rate": facts["learning_rate"], "all_steps": facts["steps"] + trial * len(facts["tried"])}
        self.add("healed", ratio, seed, pipeline, seconds=seconds, **kept)

    def add(self, step: str, ratio: float, seed: int, pipeline: Pipeline, **facts: Any) -> None:
        """Score a model and write its row."""
        nats = self.reference.divergence(pipeline.model, progress=False).mean
        self.lines.add(step=step, ratio=ratio, seed=seed, score=pipeline.score()["score"], nats=nats, **facts)

    def place(self, ratio: float, seed: int) -> Path:
        """Where a compressed model is."""
        return self.folder / f"{ratio:g}-{seed}"


def _step(model: Any, loader: DataLoader, factors: bool) -> Callable[[], Any]:
    """A step of AdamW by labels, or on the factors alone by all hidden states; the next batch with every call."""
    nn.Module.to(model, torch.float32)
    inside = tuple(f"{name}." for name in factorized_layers(model)) if factors else ("",)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(inside))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, batches = torch.optim.AdamW(trained, lr=1e-9), cycle(loader)

    def step() -> None:
        batch = next(batches)
        _loss(model, batch, factors).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss(model: Any, batch: dict[str, Any], factors: bool) -> Tensor:
    if not factors:
        return model(**batch).loss
    outputs = model(**unlabelled(model, batch), output_hidden_states=True)
    errors = [((state @ torch.eye(state.shape[-1])) * state).sum() for state in outputs.hidden_states[1:]]
    return torch.stack(errors).sum() + outputs.logits.sum()


def _asked(model: Any, loader: DataLoader) -> Callable[[], Any]:
    """What a teacher is asked of the next batch, with every call."""
    batches = cycle(loader)
    nn.Module.to(model, torch.float32)

    @torch.no_grad()
    def asked() -> None:
        model.eval()(**unlabelled(model, next(batches)), output_hidden_states=True)

    return asked


def cpu_seconds(call: Callable[[], Any]) -> float:
    """What a call takes, of all threads."""
    started = time.process_time()
    call()
    return time.process_time() - started


def _known(statistics: Statistics | None) -> Statistics:
    assert statistics is not None
    return statistics
