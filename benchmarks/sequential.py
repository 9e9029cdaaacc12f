"""What centred moments, factors behind the compressed prefix, and their anchor bring at equal parameters."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import Options, Result, Row
from hf_lowrank import CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.loading import load_model
from hf_lowrank.jobs.progress import bar
from hf_lowrank.tasks import get_task, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.evaluate import evaluate_splits

RATIOS = (0.33, 0.2, 0.1)
ALLOCATIONS = ("uniform", "greedy")
SAMPLES, BATCH_SIZE = 512, 16


def run(options: Options) -> Result:
    """Score, divergence from dense and CPU seconds of every variant, by allocation and share of the ranks."""
    if options.model is None or options.task is None:
        raise LowRankError("sequential needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    study = _Study(options)
    rows: list[Row] = []
    with bar("sequential", len(ALLOCATIONS) * len(VARIANTS), "rows") as shown:
        for allocation in ALLOCATIONS:
            for variant in VARIANTS:
                rows.append(study.row(allocation, variant))
                shown.update()
    return Result(
        f"{study.task.score} on {study.task.name} without fine-tuning; dense {study.dense:.2f}",
        rows,
        [
            f"Score, divergence from dense, and CPU seconds of factorizing, besides the {study.seconds:.0f} that "
            f"measuring the statistics takes once: {SAMPLES} samples, labels drawn from the model, seed {options.seed}."
        ],
        {"model": Path(options.model).name, "task": study.task.name, "dense": study.dense, "seed": options.seed},
    )


class _Study:
    """The model, its statistics and its data, loaded once."""

    def __init__(self, options: Options) -> None:
        self.task = get_task(options.task or "")
        self.model, self.tokenizer = load_model(options.model or "", self.task)
        self.validation = load_validation(self.task, options.data_dir, self.tokenizer, self.model.config)
        self.reference = Reference(self.model, self.tokenizer, self.task, self.validation)
        rest: Any = (options.data_dir, SAMPLES, BATCH_SIZE, options.seed, "model")
        self.loader = calibration_loader(self.model, self.tokenizer, self.task, *rest)
        started = time.process_time()
        needs = CompressionConfig().needs
        self.statistics = compute_statistics(self.model, self.loader, needs, progress=False, labels="model")
        self.seconds = time.process_time() - started
        self.dense = self._score(self.model)

    def row(self, allocation: str, variant: str) -> Row:
        """What becomes of the model at every share of the ranks."""
        row = {"allocation": allocation, "factors": variant}
        for ratio in RATIOS:
            started = time.process_time()
            low_rank = VARIANTS[variant](self, CompressionConfig(rank_ratio=ratio, allocation=allocation))
            seconds = time.process_time() - started
            divergence = self.reference.divergence(low_rank, progress=False).mean
            row[f"{ratio:.0%}"] = f"{self._score(low_rank):.2f}, {divergence:.4f}, {seconds:.0f} s"
        return row

    def compressed(self, config: CompressionConfig, statistics: Statistics | None = None) -> PreTrainedModel:
        """A copy of the model, compressed."""
        model, known = copy.deepcopy(self.model), statistics or self.statistics
        return compress(model, config, known, progress=False, batches=self.loader)[0]

    def _score(self, model: PreTrainedModel) -> float:
        return evaluate_splits(model, self.tokenizer, self.task, self.validation, progress=False)["score"]


def _not_centred(study: _Study, config: CompressionConfig) -> PreTrainedModel:
    means = {name: torch.zeros_like(total) for name, total in study.statistics.sums["activation_mean"].items()}
    return study.compressed(config, replace(study.statistics, sums=study.statistics.sums | {"activation_mean": means}))


def _without_anchor(study: _Study, config: CompressionConfig) -> PreTrainedModel:
    with _forgetting_the_drift():
        return study.compressed(replace(config, sequential=True))


VARIANTS: dict[str, Callable[[_Study, CompressionConfig], PreTrainedModel]] = {
    "one-shot, not centred": _not_centred,
    "one-shot": _Study.compressed,
    "sequential, without the anchor": _without_anchor,
    "sequential": lambda study, config: study.compressed(replace(config, sequential=True)),
}


@contextmanager
def _forgetting_the_drift() -> Iterator[None]:
    """Within the block sequential factors stand for the dense weight, on the inputs of the compressed model."""
    before = LayerSolver.behind

    def behind(solver: LayerSolver, names: Sequence[str], sums: Mapping[str, Tensor]) -> LayerSolver:
        return before(solver, names, {kind: total for kind, total in sums.items() if "drift" not in kind})

    LayerSolver.behind = behind  # type: ignore[method-assign]
    try:
        yield
    finally:
        LayerSolver.behind = before  # type: ignore[method-assign]
