"""What decides the quality of a compression besides its method: samples of statistics, their seed, and damping."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.harness import Options, Result, Row
from hf_lowrank import METHODS, CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.loading import load_model
from hf_lowrank.jobs.progress import bar
from hf_lowrank.solvers import methods
from hf_lowrank.tasks import get_task, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.evaluate import evaluate_splits

STUDIED = (("kfac", "greedy", 0.2), ("whiten-diag", "greedy", 0.2), ("tfwsvd", "uniform", 0.33))
SAMPLES = (64, 256, 512, 1024, 4096)
SEEDS = (0, 1, 2)
DAMPINGS = ((1e-5, 1e-2), (1e-3, 1e-4), (1e-3, 1e-1), (1e-1, 1e-2))  # of activations, of gradients
REFERENCE_SAMPLES = 512


def run(options: Options) -> Result:
    """Scores of some methods over the number of samples, the seed that chooses them, and damping."""
    if options.model is None or options.task is None:
        raise LowRankError("calibration needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    study = _Study(options)
    rows: list[Row] = []
    settings = [(samples, 0) for samples in SAMPLES] + [(REFERENCE_SAMPLES, seed) for seed in SEEDS if seed != 0]
    with bar("calibration", len(settings) + len(DAMPINGS), "settings") as shown:
        for samples, seed in settings:
            statistics = study.statistics(samples, seed)
            rows.append(study.row(f"{statistics.samples} samples, seed {seed}", statistics))
            if (samples, seed) == (REFERENCE_SAMPLES, 0):
                default = statistics
            shown.update()
        for activation, gradient in DAMPINGS:
            with _damping(activation, gradient):
                rows.append(study.row(f"damping {activation:g} of activations, {gradient:g} of gradients", default))
            shown.update()
    return Result(
        f"{study.task.score} on {study.task.name} by what the statistics are made of; dense {study.dense:.2f}",
        rows,
        [
            "No fine-tuning. The batch size is not among the settings: statistics are sums over single samples, and "
            "the same for every batch size."
        ],
        {"model": Path(options.model).name, "task": study.task.name, "dense": study.dense, "rows": rows},
    )


class _Study:
    """The model and its data, loaded once."""

    def __init__(self, options: Options) -> None:
        self.task, self.data_dir = get_task(options.task or ""), options.data_dir
        self.model, self.tokenizer = load_model(options.model or "", self.task)
        self.validation = load_validation(self.task, self.data_dir, self.tokenizer, self.model.config)
        self.dense = self._score(self.model)

    def statistics(self, samples: int, seed: int) -> Statistics:
        """What all studied methods need."""
        needs = dict.fromkeys(need for name, *_ in STUDIED for need in METHODS[name].needs_for(losses=True))
        loader = calibration_loader(self.model, self.tokenizer, self.task, self.data_dir, samples, seed=seed)
        return compute_statistics(self.model, loader, list(needs), progress=False)

    def row(self, setting: str, statistics: Statistics) -> Row:
        """The score of each studied method with these statistics."""
        row = {"statistics": setting}
        for name, allocation, ratio in STUDIED:
            config = CompressionConfig(name, ratio, allocation, align=1)
            low_rank, _ = compress(copy.deepcopy(self.model), config, statistics, progress=False)
            row[f"{name}, {allocation}, {ratio:.0%}"] = f"{self._score(low_rank):.2f}"
        return row

    def _score(self, model: PreTrainedModel) -> float:
        return evaluate_splits(model, self.tokenizer, self.task, self.validation, progress=False)["score"]


@contextmanager
def _damping(activation: float, gradient: float) -> Iterator[None]:
    """Within the block moments are damped by these shares of their mean diagonal."""
    before = methods.ACTIVATION_DAMPING, methods.GRADIENT_DAMPING
    methods.ACTIVATION_DAMPING, methods.GRADIENT_DAMPING = activation, gradient
    try:
        yield
    finally:
        methods.ACTIVATION_DAMPING, methods.GRADIENT_DAMPING = before
