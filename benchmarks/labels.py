"""Labels of the data against labels drawn from the model itself → scores and divergences from dense, over seeds."""

import copy
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from transformers import PreTrainedModel

from benchmarks.harness import Options, Result, Row
from hf_lowrank import METHODS, CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.loading import load_model
from hf_lowrank.jobs.progress import bar
from hf_lowrank.statistics.names import LABELS
from hf_lowrank.tasks import get_task, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.evaluate import evaluate_splits

# (method, allocation, share of the ranks)
STUDIED = (
    ("kfac", "uniform", 0.2),
    ("kfac", "uniform", 0.1),
    ("kfac", "greedy", 0.2),
    ("kfac", "greedy", 0.1),
    ("whiten-diag", "greedy", 0.2),
    ("whiten-diag", "greedy", 0.1),
)
Studied = tuple[str, str, float]
SEEDS = (0, 1, 2)
SAMPLES = 512


class Measured(NamedTuple):
    """A compressed model's score, and its divergence from dense."""

    score: float
    divergence: float


def run(options: Options) -> Result:
    """Every studied method with statistics by both kinds of labels, over calibration seeds."""
    if options.model is None or options.task is None:
        raise LowRankError("labels needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    study = _Study(options)
    found: dict[tuple[str, Studied], list[Measured]] = {}
    with bar("labels", len(SEEDS) * len(LABELS) * len(STUDIED), "models") as shown:
        for seed in SEEDS:
            for labels in LABELS:
                statistics = study.statistics(labels, seed)
                for studied in STUDIED:
                    found.setdefault((labels, studied), []).append(study.measured(studied, statistics))
                    shown.update()
    rows = [_row(studied, *(found[labels, studied] for labels in LABELS)) for studied in STUDIED]
    figures = [
        {"labels": labels, "studied": studied, "measured": [each._asdict() for each in measured]}
        for (labels, studied), measured in found.items()
    ]
    return Result(
        f"{study.task.score} on {study.task.name} by the labels of the statistics; dense {study.dense:.2f}",
        rows,
        [
            f"No fine-tuning; {SAMPLES} samples, means ± standard deviations over seeds {', '.join(map(str, SEEDS))} "
            f"of the calibration. From dense: {study.measure}."
        ],
        {"model": Path(options.model).name, "task": study.task.name, "dense": study.dense, "all": figures},
    )


def _row(studied: Studied, data: list[Measured], model: list[Measured]) -> Row:
    method, allocation, ratio = studied
    change = fmean(each.divergence for each in model) / fmean(each.divergence for each in data)
    return {
        "method": f"{method}, {allocation}",
        "ranks": f"{ratio:.0%}",
        "score, labels of the data": _spread([each.score for each in data], "{:.2f}"),
        "drawn from the model": _spread([each.score for each in model], "{:.2f}"),
        "from dense, labels of the data": _spread([each.divergence for each in data], "{:.4f}"),
        "drawn from the model ": _spread([each.divergence for each in model], "{:.4f}"),
        "drawn / data": f"{change:.2f}",
    }


def _spread(values: list[float], form: str) -> str:
    return f"{form.format(fmean(values))} ± {form.format(stdev(values))}"


class _Study:
    """The model and its data, loaded once."""

    def __init__(self, options: Options) -> None:
        self.task, self.data_dir = get_task(options.task or ""), options.data_dir
        self.model, self.tokenizer = load_model(options.model or "", self.task)
        self.validation = load_validation(self.task, self.data_dir, self.tokenizer, self.model.config)
        self.reference = Reference(self.model, self.tokenizer, self.task, self.validation)
        self.dense = self._score(self.model)
        self.measure = self.reference.divergence(self.model, progress=False).measure

    def statistics(self, labels: str, seed: int) -> Statistics:
        """What all studied methods need, by these labels."""
        needs = dict.fromkeys(need for name, *_ in STUDIED for need in METHODS[name].needs_for(losses=True))
        loader = calibration_loader(self.model, self.tokenizer, self.task, self.data_dir, SAMPLES, seed=seed)
        return compute_statistics(self.model, loader, list(needs), origin={"seed": seed}, progress=False, labels=labels)

    def measured(self, studied: Studied, statistics: Statistics) -> Measured:
        """A model made by these statistics."""
        method, allocation, ratio = studied
        config = CompressionConfig(method, ratio, allocation)
        low_rank, _ = compress(copy.deepcopy(self.model), config, statistics, progress=False)
        return Measured(self._score(low_rank), self.reference.divergence(low_rank, progress=False).mean)

    def _score(self, model: PreTrainedModel) -> float:
        return evaluate_splits(model, self.tokenizer, self.task, self.validation, progress=False)["score"]
