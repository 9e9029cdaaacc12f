"""A model and a task → the score, size, loss and time of every method × allocation × budget. Resumable."""

import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.allocation import ImpossibleBudget, Profile, get_allocation
from hf_lowrank.compression.compress import checked_targets
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.profiling import mean_loss
from hf_lowrank.compression.solution import kept_report
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.claims import differences
from hf_lowrank.jobs.distributed import refuse_several
from hf_lowrank.jobs.files import held, read_json, write_json, write_text
from hf_lowrank.jobs.progress import bar
from hf_lowrank.jobs.turns import Call, seconds_in_turns
from hf_lowrank.model.predictions import unlabelled
from hf_lowrank.model.targets import dense_parameters, factorized_layers
from hf_lowrank.model.weights import model_digest
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.statistics import Statistics
from hf_lowrank.statistics.names import LABELS
from hf_lowrank.studies.sweep_settings import SweepConfig
from hf_lowrank.tasks.calibration import data_digest
from hf_lowrank.tasks.data import content_digest
from hf_lowrank.training.divergence import Reference

SETTINGS, RESULTS, STATISTICS = "sweep.json", "results.jsonl", "statistics"

# Time is measured on a batch of so many rows, in so many rounds.
LATENCY_ROWS, LATENCY_ROUNDS = 32, 5

Record = dict[str, Any]


def sweep(pipeline: Pipeline, config: SweepConfig, folder: Path) -> list[Record]:
    """Make and measure every model of the sweep; the first record is of the model as it is, dense or compressed before.

    Sizes and budgets are relative to the dense model, losses and times to the model as it is.

    Results are appended to `folder` as they come. A sweep that was interrupted, or is given further methods or values,
    goes on with what is missing. A budget that cannot be met leaves a record that says so.

    Raises:
        LowRankError: unusable data, or a model of sentence-transformers; or the folder holds a sweep of another model,
            data, or settings.
    """
    refuse_several("a sweep")
    pipeline.check_losses("a sweep")
    model, wanted = pipeline.model, [None, *config.runs()]
    checked_targets(model, config.runs()[0])  # before anything is measured
    with held(folder), bar("sweep", len(wanted), "models") as shown:
        bench = _Bench(pipeline, config, folder)
        done = {_key(record): record for record in read_results(folder)}
        for run in wanted:
            key = _run_key(run, model)
            if key not in done:
                done[key] = bench.reference() if run is None else bench.compressed(run)
                _append(folder, done[key])
            shown.update()
    return [done[_run_key(run, model)] for run in wanted]


def forget(folder: Path) -> None:
    """Remove the results and statistics of a sweep, and nothing else, so that one of other settings can begin."""
    for name in (SETTINGS, RESULTS):
        (folder / name).unlink(missing_ok=True)
    for labels in LABELS:
        shutil.rmtree(folder / _folder_of(labels), ignore_errors=True)


def read_results(folder: Path) -> list[Record]:
    """The records of a sweep so far; a last line that was cut off by a crash does not count.

    Raises:
        LowRankError: another line is damaged.
    """
    path = folder / RESULTS
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            if number < len(lines):
                raise LowRankError(f"{path}, line {number} is damaged; remove it to measure that model again") from None
    return records


class _Bench:
    """What all models of a sweep share: the dense model's pipeline, statistics, and how they are measured."""

    def __init__(self, pipeline: Pipeline, config: SweepConfig, folder: Path) -> None:
        self.pipeline, self.model, self.config, self.folder = pipeline, pipeline.model, config, folder
        self._claim()
        self.reference_outputs = Reference(self.model, *pipeline.reading, pipeline.validation)
        self.statistics = {labels: self._statistics(labels) for labels in map(pipeline.labels_for, config.runs())}
        self.batch = next(iter(pipeline.batches(pipeline.validation[0], LATENCY_ROWS)))

    def reference(self) -> Record:
        """The record of the model as it is: dense, or compressed before and then called given."""
        figures = self.pipeline.score_and_loss() | {"calibration_loss": self._calibration_loss(self.model)}
        parameters = {"parameters": self.model.num_parameters(), "parameters_dense": dense_parameters(self.model)}
        layers = checked_targets(self.model, self.config.runs()[0])
        reports = [kept_report(target) for target in layers.values()]
        after, before = (sum(getattr(r, f"parameters_{when}") for r in reports) for when in ("after", "before"))
        share = {"targeted": after / before, "relative_latency": 1.0}
        return {"method": _reference_name(self.model), **parameters, **share, **figures}

    def compressed(self, run: CompressionConfig) -> Record:
        """The record of one compressed model, with its score after fine-tuning if that is asked for."""
        named = {
            "method": run.method,
            "allocation": run.allocation,
            "budget": run.budget.kind,
            "value": run.budget.value,
        }
        started, candidate = time.perf_counter(), self.pipeline.candidate()
        try:
            report = candidate.compress(run, self._of(run), self._profile(run))
        except ImpossibleBudget as error:
            return named | {"impossible": str(error)}
        record = named | {
            "parameters": report.parameters_after,
            "targeted": report.targeted_after / report.targeted_before,
            "expected_loss": report.expected_loss,
            "seconds": time.perf_counter() - started,
            **candidate.score_and_loss(),
            "divergence": self.reference_outputs.divergence(candidate.model, progress=False).to_dict(),
            "labels": self.pipeline.labels_for(run) if run.needs else None,
            "calibration_loss": self._calibration_loss(candidate.model),
            "relative_latency": self._relative_latency(candidate.model),
            "ranks": {layer.name: layer.rank for layer in report.layers},
        }
        if self.config.epochs:
            facts = candidate.finetune(epochs=self.config.epochs, bf16=self.config.bf16, seed=self.pipeline.seed)
            record |= {"score_finetuned": facts["score"], "finetuning_seconds": facts["seconds"]}
        return record

    def _calibration_loss(self, model: PreTrainedModel) -> float:
        """The mean loss on the samples that statistics are measured on: what `expected_loss` is about."""
        return mean_loss(model, self.pipeline.rows(self.pipeline.samples))

    @torch.inference_mode()
    def _relative_latency(self, low_rank: PreTrainedModel) -> float:
        """The time of a batch relative to the dense model's, the median of rounds in which both take turns."""
        batch = {k: v.to(self.model.device) for k, v in unlabelled(self.model, self.batch).items()}
        models = {"dense": self.model.eval(), "low_rank": low_rank.eval()}
        calls: dict[str, Call] = {name: partial(model, **batch) for name, model in models.items()}
        seconds = seconds_in_turns(calls, LATENCY_ROUNDS, self.model.device)
        return median(low / dense for dense, low in zip(seconds["dense"], seconds["low_rank"], strict=True))

    def _claim(self) -> None:
        """Note what the folder's results are of, or raise where that is something else."""
        fixed = ("epochs", "bf16", "include", "exclude", "align", "form")
        rows, task = sys.maxsize if self.config.epochs else self.pipeline.samples, self.pipeline.reading[1]
        settings = {
            "task": task.name,
            "max_length": task.max_length,
            **self.pipeline.origin,
            "samples": self.pipeline.samples,
            **{name: getattr(self.config, name) for name in fixed},
            "labels": self.pipeline.labels,
            "sequential": "by method" if self.config.sequential is None else self.config.sequential,
            "model weights": model_digest(self.model),
            "training data": data_digest(self.pipeline.rows(rows)),
            "validation data": content_digest(self.pipeline.validation),
        }
        path = self.folder / SETTINGS
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            return write_json(path, settings)
        for name, before, now in differences(read_json(path), settings):
            raise LowRankError(
                f"{self.folder} holds a sweep with {name} {before!r}, this one has {now!r}; choose another "
                "folder or pass --overwrite"
            )

    def _of(self, run: CompressionConfig) -> Statistics | None:
        """The statistics for a run."""
        return self.statistics[self.pipeline.labels_for(run)]

    def _statistics(self, labels: str) -> Statistics | None:
        """What all methods of the sweep by these labels need, measured once and kept in the folder."""
        runs = [run for run in self.config.runs() if self.pipeline.labels_for(run) == labels]
        needs = list(dict.fromkeys(need for run in runs for need in run.needs))
        path = self.folder / _folder_of(labels)
        saved = Statistics.load(path) if path.is_dir() else None
        if not needs or (saved is not None and all(saved.has(kind) for kind in needs)):
            return saved
        kinds = [*needs, *(saved.kinds if saved else ())]
        measured = self.pipeline.measure(kinds, self.config.include, self.config.exclude, labels)
        measured.save(path, overwrite=True)
        return measured

    def _profile(self, run: CompressionConfig) -> Profile | None:
        path = self.folder / f"profile-{run.method}.json"
        if get_allocation(run.allocation or "").losses != "profile":
            return None
        if not path.is_file():
            write_json(path, self.pipeline.profile(run, self._of(run)))
        return {name: {int(rank): loss for rank, loss in by_rank.items()} for name, by_rank in read_json(path).items()}


def _folder_of(labels: str) -> str:
    return STATISTICS if labels == "data" else f"{STATISTICS}-{labels}"


def _append(folder: Path, record: Record) -> None:
    path = folder / RESULTS
    if path.is_file() and not path.read_text(encoding="utf-8").endswith("\n"):  # cut off by a crash
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
        write_text(path, whole + "\n" if whole else "")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("method", "allocation", "budget", "value"))


def _run_key(run: CompressionConfig | None, model: PreTrainedModel) -> tuple[Any, ...]:
    if run is None:
        return (_reference_name(model), None, None, None)
    return run.method, run.allocation, run.budget.kind, run.budget.value


def _reference_name(model: PreTrainedModel) -> str:
    return "given" if factorized_layers(model) else "dense"
