"""Where the time of `compress` goes, end to end: data, the model's own passes, statistics, factorization, saving."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from benchmarks.harness import Options, Result, steady_clock
from hf_lowrank import METHODS, CompressionConfig, compress, compute_statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.loading import load_model
from hf_lowrank.folder.saving import save_compressed
from hf_lowrank.tasks import get_task
from hf_lowrank.tasks.calibration import calibration_loader

CONFIG = CompressionConfig("kfac", 0.33)
PASSES, MOMENTS, FACTORS = "forward and backward passes", "moments and checks", "ranks and factors"
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
DECOMPOSITIONS = {"linalg_cholesky_ex", "_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_solve_triangular"}


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
    kinds, loader = METHODS[CONFIG.method].needs, DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    passes = _training_passes(model, batches)
    with stages("statistics"):
        statistics = compute_statistics(model, loader, kinds, progress=False)
    twin = copy.deepcopy(model)
    with stages(FACTORS):
        model, report = compress(model, CONFIG, statistics, progress=False)
    with tempfile.TemporaryDirectory() as scratch, stages("saving"):
        save_compressed(model, tokenizer, report, Path(scratch) / "model")
    stages.split("statistics", PASSES, passes, MOMENTS)
    with Arithmetic() as own:
        _training_passes(twin, batches)
    with Arithmetic() as measuring:
        compute_statistics(twin, loader, kinds, progress=False)
    with Arithmetic() as factorizing:
        compress(twin, CONFIG, statistics, progress=False)
    arithmetic = {MOMENTS: measuring.minus(own), FACTORS: factorizing.seconds}
    return _result(stages.seconds, arithmetic, statistics.samples)


def _result(seconds: dict[str, float], arithmetic: dict[str, dict[str, float]], samples: int) -> Result:
    whole = sum(seconds.values())
    rest = {name: s - sum(arithmetic.get(name, {}).values()) for name, s in seconds.items() if name != PASSES}
    rows = []
    for name, s in seconds.items():
        parts = {part: arithmetic.get(name, {}).get(part, 0.0) for part in ("products", "decompositions")}
        rows.append(
            {"stage": name, "s": f"{s:.2f}", "share": f"{s / whole:.1%}"}
            | {f"{part}, s": f"{value:.2f}" if value else "–" for part, value in parts.items()}
            | {"rest": f"{rest[name] / whole:.1%}" if name in rest else "–"}
        )
    clock = "CPU time of the thread" if torch.get_num_threads() == 1 else "Wall time"
    return Result(
        f"profile: compress by {CONFIG.method} at {CONFIG.rank_ratio}, {samples} samples, {whole:.1f} s",
        rows,
        [
            f"{clock}. Forward and backward passes: those over the same batches without our hooks, weights frozen, "
            "gradients of the activations alone. Products of matrices and decompositions (Cholesky, eigenvectors, QR, "
            f"triangular systems) are timed in a second run. The rest: {sum(rest.values()) / whole:.1%}."
        ],
        {"seconds": seconds, "arithmetic": arithmetic, "rest": sum(rest.values()) / whole},
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


class Arithmetic(TorchDispatchMode):
    """Within the block, seconds spent in products of matrices and in their decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = steady_clock()
        self.seconds = {"products": 0.0, "decompositions": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        part = "products" if name in PRODUCTS else "decompositions" if name in DECOMPOSITIONS else None
        if part is None:
            return func(*args, **(kwargs or {}))
        started = self.clock()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.seconds[part] += self.clock() - started

    def minus(self, other: "Arithmetic") -> dict[str, float]:
        """What is more than in another block."""
        return {part: seconds - other.seconds[part] for part, seconds in self.seconds.items()}


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
