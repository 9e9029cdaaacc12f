"""A model and a task → the score, size, loss and time of every method × allocation × budget. Resumable."""

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.allocation import ImpossibleBudget, Profile, get_allocation
from hf_lowrank.compression.compress import checked_targets, compress
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.profiling import PROFILE_SAMPLES, mean_loss, profile_losses
from hf_lowrank.compression.solution import kept_report
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.claims import differences
from hf_lowrank.jobs.distributed import refuse_several
from hf_lowrank.jobs.files import held, read_json, write_json, write_text
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import dense_parameters, factorized_layers
from hf_lowrank.model.weights import model_digest
from hf_lowrank.statistics import Statistics, compute_statistics
from hf_lowrank.statistics.names import LABELS
from hf_lowrank.studies.sweep_settings import SweepConfig
from hf_lowrank.tasks import Task, collator, load_validation
from hf_lowrank.tasks.calibration import calibration_loader, data_digest
from hf_lowrank.tasks.data import content_digest
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.evaluate import predict_rows, score_predictions
from hf_lowrank.training.finetune import finetune

SETTINGS, RESULTS, STATISTICS = "sweep.json", "results.jsonl", "statistics"

# Time is measured on a batch of so many rows, in so many rounds.
LATENCY_ROWS, LATENCY_ROUNDS = 32, 5

Record = dict[str, Any]


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data_dir: Path | None,
    config: SweepConfig,
    folder: Path,
    origin: dict[str, Any] | None = None,
) -> list[Record]:
    """Make and measure every model of the sweep; the first record is of the model as it is, dense or compressed before.

    Sizes and budgets are relative to the dense model, losses and times to the model as it is.

    Results are appended to `folder` as they come. A sweep that was interrupted, or is given further methods or values,
    goes on with what is missing. A budget that cannot be met leaves a record that says so.

    Raises:
        LowRankError: unusable data; or the folder holds a sweep of another model, data, or settings.
    """
    refuse_several("a sweep")
    validation = load_validation(task, data_dir, tokenizer, model.config)
    wanted = [None, *config.runs()]
    checked_targets(model, config.runs()[0])  # before anything is measured
    with held(folder), bar("sweep", len(wanted), "models") as shown:
        bench = _Bench(model, tokenizer, task, data_dir, config, folder, origin or {}, validation)
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
    """What all models of a sweep share: the dense model, encoded data, statistics, and how they are measured."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        data_dir: Path | None,
        config: SweepConfig,
        folder: Path,
        origin: dict[str, Any],
        validation: Sequence[Dataset],
    ) -> None:
        self.model, self.tokenizer, self.task, self.data_dir = model, tokenizer, task, data_dir
        self.config, self.folder, self.validation = config, folder, validation
        self._claim(origin)
        self.reference_outputs = Reference(model, tokenizer, task, validation)
        self.statistics = {labels: self._statistics(origin, labels) for labels in map(config.labels_of, config.runs())}
        rows = self.validation[0].select(range(min(LATENCY_ROWS, len(self.validation[0]))))
        self.batch = next(iter(DataLoader(rows, batch_size=LATENCY_ROWS, collate_fn=collator(task, tokenizer))))

    def reference(self) -> Record:
        """The record of the model as it is: dense, or compressed before and then called given."""
        figures = self._measure(self.model) | {"calibration_loss": self._calibration_loss(self.model)}
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
        started = time.perf_counter()
        try:
            profile = self._profile(run)
            low_rank, report = compress(copy.deepcopy(self.model), run, self._of(run), progress=False, profile=profile)
        except ImpossibleBudget as error:
            return named | {"impossible": str(error)}
        record = named | {
            "parameters": report.parameters_after,
            "targeted": report.targeted_after / report.targeted_before,
            "expected_loss": report.expected_loss,
            "seconds": time.perf_counter() - started,
            **self._measure(low_rank),
            "divergence": self.reference_outputs.divergence(low_rank, progress=False).to_dict(),
            "labels": self.config.labels_of(run) if run.needs else None,
            "calibration_loss": self._calibration_loss(low_rank),
            "relative_latency": self._relative_latency(low_rank),
            "ranks": {layer.name: layer.rank for layer in report.layers},
        }
        if self.config.epochs:
            settings: Any = {"epochs": self.config.epochs, "bf16": self.config.bf16, "seed": self.config.seed}
            facts = finetune(low_rank, self.tokenizer, self.task, self.data_dir, progress=False, **settings)
            record |= {"score_finetuned": facts["score"], "finetuning_seconds": facts["seconds"]}
        return record

    def _measure(self, model: PreTrainedModel) -> Record:
        """Score and mean loss on the validation data; over several splits the mean."""
        scores, losses = [], []
        for rows in self.validation:
            outputs = predict_rows(model, self.tokenizer, self.task, rows, progress=False)
            scores.append(score_predictions(outputs, self.task, model.config)["score"])
            losses.append(sum(outputs.losses) / len(outputs.losses))
        return {"score": sum(scores) / len(scores), "loss": sum(losses) / len(losses)}

    def _calibration_loss(self, model: PreTrainedModel) -> float:
        """The mean loss on the samples that statistics are measured on: what `expected_loss` is about."""
        return mean_loss(model, self._loader(self.config.samples))

    @torch.inference_mode()
    def _relative_latency(self, low_rank: PreTrainedModel) -> float:
        """The time of a batch relative to the dense model's, the median of rounds in which both take turns."""
        batch = {key: value.to(self.model.device) for key, value in self.batch.items() if key != "labels"}
        ratios = []
        for _ in range(LATENCY_ROUNDS + 1):
            seconds = []
            for model in (self.model.eval(), low_rank.eval()):
                started = time.perf_counter()
                model(**batch)
                if self.model.device.type == "cuda":
                    torch.cuda.synchronize(self.model.device)
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[1] / seconds[0])
        return median(ratios[1:])

    def _claim(self, origin: dict[str, Any]) -> None:
        """Note what the folder's results are of, or raise where that is something else."""
        fixed = ("epochs", "bf16", "samples", "seed", "include", "exclude", "align", "form", "labels")
        rows = sys.maxsize if self.config.epochs else self.config.samples
        settings = {
            "task": self.task.name,
            "max_length": self.task.max_length,
            **origin,
            **{name: getattr(self.config, name) for name in fixed},
            "model weights": model_digest(self.model),
            "training data": data_digest(self._loader(rows)),
            "validation data": content_digest(self.validation),
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
        return self.statistics[self.config.labels_of(run)]

    def _statistics(self, origin: dict[str, Any], labels: str) -> Statistics | None:
        """What all methods of the sweep by these labels need, measured once and kept in the folder."""
        runs = [run for run in self.config.runs() if self.config.labels_of(run) == labels]
        needs = list(dict.fromkeys(need for run in runs for need in run.needs))
        path = self.folder / _folder_of(labels)
        saved = Statistics.load(path) if path.is_dir() else None
        if not needs or (saved is not None and all(saved.has(kind) for kind in needs)):
            return saved
        measured = compute_statistics(
            self.model,
            self._loader(self.config.samples, labels),
            [*needs, *(saved.kinds if saved else ())],
            include=self.config.include,
            exclude=self.config.exclude,
            origin=origin,
            labels=labels,
        )
        measured.save(path, overwrite=True)
        return measured

    def _profile(self, run: CompressionConfig) -> Profile | None:
        if get_allocation(run.allocation or "").losses != "profile":
            return None
        path = self.folder / f"profile-{run.method}.json"
        if not path.is_file():
            write_json(path, profile_losses(self.model, run, self._of(run), self._loader(PROFILE_SAMPLES)))
        return {name: {int(rank): loss for rank, loss in by_rank.items()} for name, by_rank in read_json(path).items()}

    def _loader(self, samples: int, labels: str = "data") -> DataLoader:
        rest = (self.data_dir, samples, self.config.batch_size, self.config.seed, labels)
        return calibration_loader(self.model, self.tokenizer, self.task, *rest)


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
