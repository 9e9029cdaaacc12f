"""Where the time of `compress` goes, end to end: data, the model's own passes, statistics, factorization, saving."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.harness import Options, Result, steady_clock
from hf_lowrank import METHODS, CompressionConfig, compress, compute_statistics
from hf_lowrank.calibration import calibration_loader
from hf_lowrank.errors import LowRankError
from hf_lowrank.loading import load_model
from hf_lowrank.saving import save_compressed
from hf_lowrank.tasks import get_task

CONFIG = CompressionConfig("kfac", 0.33)


def run(options: Options) -> Result:
    """Seconds and shares of the stages of one compression, on one clock; the model's passes apart from statistics."""
    if options.model is None or options.task is None:
        raise LowRankError("profile needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    stages = Stages()
    task = get_task(options.task)
    with stages("loading the model"):
        model, tokenizer = load_model(options.model, task)
    with stages("reading and tokenising data"):
        loader = calibration_loader(model, tokenizer, task, options.data_dir)
    with stages("batches"):
        batches = list(loader)
    passes = _training_passes(model, batches)
    with stages("statistics"):
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        statistics = compute_statistics(model, loader, METHODS[CONFIG.method].needs, progress=False)
    with stages("ranks and factors"):
        model, report = compress(model, CONFIG, statistics, progress=False)
    with tempfile.TemporaryDirectory() as scratch, stages("saving"):
        save_compressed(model, tokenizer, report, Path(scratch) / "model")
    stages.split("statistics", "forward and backward passes", passes, "moments and checks")
    whole = sum(stages.seconds.values())
    clock = "CPU time of the thread" if torch.get_num_threads() == 1 else "Wall time"
    return Result(
        f"profile: compress by {CONFIG.method} at {CONFIG.rank_ratio}, {statistics.samples} samples, {whole:.1f} s",
        [{"stage": name, "s": f"{s:.2f}", "share": f"{s / whole:.1%}"} for name, s in stages.seconds.items()],
        [
            f"{clock}. Forward and backward passes: those over the same batches without our hooks, weights frozen, "
            "gradients of the activations alone; the rest of the statistics is theirs."
        ],
        {"seconds": stages.seconds},
    )


class Stages:
    """Seconds by stage, by `steady_clock`."""

    def __init__(self) -> None:
        self.clock = steady_clock()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self.clock()
        yield
        self.seconds[name] = self.clock() - started

    def split(self, stage: str, first: str, seconds: float, second: str) -> None:
        """Replace a stage by two, the first of a known time."""
        parts = {first: seconds, second: max(0.0, self.seconds[stage] - seconds)}
        self.seconds = {
            name: value
            for old, whole in self.seconds.items()
            for name, value in (parts.items() if old == stage else [(old, whole)])
        }


def _training_passes(model: Any, batches: list[Any]) -> float:
    """Seconds of forward and backward over the batches, as statistics need them: no gradients of weights."""
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_())
    clock = steady_clock()
    try:
        started = clock()
        for batch in batches:
            model(**{name: value.to(model.device) for name, value in batch.items()}).loss.backward()
        return clock() - started
    finally:
        handle.remove()
        for parameter, requires_grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(requires_grad)
