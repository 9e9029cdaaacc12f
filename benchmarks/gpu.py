"""What no CPU can tell, in eight minutes on one GPU, at the shapes of Llama-3-8B: statistics, factors, layers, a model.

Weights are random. Every section has minutes of its own, and every figure is written as it comes.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, set_seed

from benchmarks.harness import Options, Result, machine_facts
from benchmarks.models import LlamaShape
from hf_lowrank import CompressionConfig, LowRankLinear, Statistics, compress, compute_statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.files import write_json
from hf_lowrank.jobs.turns import seconds_in_turns
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.studies.bench.record import DENSE, LOW
from hf_lowrank.studies.bench.run import BenchConfig, cases

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes(LlamaShape):
    """A model's shape, and how much is measured of it."""

    vocabulary: int = 128256
    windows: int = 8
    length: int = 2048
    keep: float = 0.8
    tokens: tuple[int, ...] = (1, 16, 128, 4096)
    batches: tuple[int, ...] = (1, 32)
    prompt: int = 512
    rounds: int = 10

    def model(self, layers: int, vocabulary: int, device: torch.device) -> PreTrainedModel:
        """A Llama of so many blocks with random weights, in bfloat16 on an accelerator."""
        set_seed(0)
        config = replace(self, layers=layers).config(vocabulary, 2 * max(self.length, self.prompt))
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=_dtype(device))
        return model.eval().requires_grad_(False)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The layers of a block with different shapes: (in, out) by the name of one of them."""
        narrow = self.hidden * self.key_value_heads // self.heads
        wide = self.intermediate
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, narrow),
            "mlp.gate_proj": (self.hidden, wide),
            "mlp.down_proj": (wide, self.hidden),
        }

    def rank(self, shape: tuple[int, int], align: int = 8) -> int:
        """The rank at which a layer has `keep` of its parameters."""
        inputs, outputs = shape
        return max(1, round(self.keep * inputs * outputs / (inputs + outputs) / align) * align)


@dataclass
class Run:
    """One run: what sections share, and the record that is written after every figure."""

    sizes: Sizes
    device: torch.device
    path: Path | None
    record: Figures
    measured: dict[str, Statistics] = field(default_factory=dict)

    def section(self, name: str, seconds: float, rows: Iterator[Figures]) -> None:
        """Write its rows as they come, until its time is over or something fails, which is written too."""
        started = time.perf_counter()
        kept: Figures = {"rows": [], "budget_seconds": seconds}
        self.record["sections"][name] = kept
        try:
            for row in rows:
                kept["rows"].append(row)
                kept["seconds"] = time.perf_counter() - started
                self.write()
                if kept["seconds"] > seconds:
                    kept["ended"] = "its time was over"
                    break
        except Exception as error:  # out of memory, no compiler, …: the other sections are measured all the same
            kept["ended"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        finally:
            rows.close()  # type: ignore[attr-defined]  # lets go of its models
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        kept["seconds"] = time.perf_counter() - started
        self.write()

    def write(self) -> None:
        """The record so far."""
        if self.path is not None:
            write_json(self.path, self.record)

    def timed(self, call: Callable[[], Any]) -> tuple[Any, Figures]:
        """What a call gives, its seconds, and the bytes held at its peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = call()
        facts: Figures = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            facts = {"peak_bytes": torch.cuda.max_memory_allocated()}
        return result, {"seconds": time.perf_counter() - started, **facts}


def run(options: Options) -> Result:
    """Everything on the GPU that there is."""
    if not torch.cuda.is_available():
        raise LowRankError("gpu needs an NVIDIA or AMD GPU that PyTorch sees (torch.cuda.is_available())")
    record = measure(Sizes(), torch.device("cuda"), options.json)
    rows = [
        {"section": name, "seconds": f"{section['seconds']:.0f}", "what": _told(row)}
        for name, section in record["sections"].items()
        for row in [*section["rows"], *([{"ended": section["ended"]}] if "ended" in section else [])]
    ]
    return Result(f"gpu: shapes of Llama-3-8B, random weights, {record['machine']['accelerator']}", rows, [], record)


def measure(sizes: Sizes, device: torch.device, path: Path | None = None) -> Figures:
    """All sections, one after the other; the record, which stands in `path` as it grows."""
    run = Run(sizes, device, path, {"sizes": vars(sizes), "machine": machine_facts(device), "sections": {}})
    run.section("layers", 60, layers(run))
    run.section("statistics", 90, collected(run))
    run.section("factorization", 120, factorized(run))
    run.section("model", 150, whole(run))
    run.section("layers compiled", 60, layers(run, compiled=True))
    return run.record


def collected(run: Run) -> Iterator[Figures]:
    """One block's statistics for the default method, and for TFWSVD, beside a training pass over the same windows."""
    sizes = run.sizes
    model = sizes.model(1, 1024, run.device)
    ids = torch.randint(1024, (sizes.windows, sizes.length)).to(run.device)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(1)]
    _training_pass(model, batches[:1])
    _, facts = run.timed(lambda: _training_pass(model, batches))
    training = facts["seconds"]
    yield {"what": "a training pass", "tokens": ids.numel(), **facts}
    for method in ("kfac", "tfwsvd"):
        config = CompressionConfig(method, keep=sizes.keep)
        labels = "model" if method == "kfac" else "data"
        call = _measuring(model, batches, config, labels)
        run.measured[method], facts = run.timed(call)
        yield {"what": f"statistics for {method}", "of a training pass": facts["seconds"] / training, **facts}


def factorized(run: Run) -> Iterator[Figures]:
    """Seconds for every shape of layer by the default method, and by TFWSVD."""
    sizes = run.sizes
    model = sizes.model(1, 1024, run.device)
    for method, measured in run.measured.items():
        for name, shape in sizes.shapes.items():
            config = CompressionConfig(method, keep=sizes.keep, allocation="uniform", include=(f"*.{name}",))
            copied = copy.deepcopy(model)
            _, facts = run.timed(lambda: compress(copied, config, measured, progress=False))  # noqa: B023
            yield {"method": method, "layer": name, "in × out": list(shape), **facts}


@torch.inference_mode()
def layers(run: Run, compiled: bool = False) -> Iterator[Figures]:
    """The speed-up of a low-rank layer over the dense one by the tokens at once, as a share of the arithmetic ratio."""
    sizes = run.sizes
    for name, shape in sizes.shapes.items():
        inputs, outputs = shape
        dense: Any = nn.Linear(inputs, outputs, bias=False, device=run.device, dtype=_dtype(run.device))
        rank = sizes.rank(shape)
        low: Any = LowRankLinear.like(dense, rank)
        for factor in low.parameters():
            nn.init.normal_(factor, std=0.02)
        arithmetic = inputs * outputs / (rank * (inputs + outputs))
        for tokens in sizes.tokens:
            x = torch.randn(tokens, inputs, device=run.device, dtype=_dtype(run.device))
            calls = {DENSE: _repeated(dense, x), LOW: _repeated(low, x)}
            if compiled:
                torch._dynamo.reset()
                calls = {DENSE: calls[DENSE], LOW: _repeated(torch.compile(low), x)}
            seconds = seconds_in_turns(calls, sizes.rounds, run.device)
            speedup = statistics.median(a / b for a, b in zip(seconds[DENSE], seconds[LOW], strict=True))
            yield {
                "layer": name,
                "rank": rank,
                "tokens": tokens,
                "microseconds": {which: 1e6 * statistics.median(taken) / REPEATS for which, taken in seconds.items()},
                "speedup": speedup,
                "arithmetic": arithmetic,
                "realised": speedup / arithmetic,
            }


REPEATS = 20  # of a layer in one timing


def whole(run: Run) -> Iterator[Figures]:
    """Prefill and decoding with the cache of keys and values, dense and low rank, by the batch."""
    sizes = run.sizes
    low = sizes.model(sizes.layers, sizes.vocabulary, run.device)
    _factorize(low, sizes)
    models = {DENSE: sizes.model(sizes.layers, sizes.vocabulary, run.device), LOW: low}
    yield {"parameters": {which: model.num_parameters() for which, model in models.items()}}
    config = BenchConfig(sizes.batches, (sizes.prompt,), max(2, sizes.rounds // 2))
    for batch in sizes.batches:
        with torch.inference_mode():
            for case in cases(models, batch, sizes.prompt, config, run.device):
                yield case.to_dict(rounds=False)


def _factorize(model: PreTrainedModel, sizes: Sizes) -> None:
    """Random factors in place of every linear of the blocks, at the rank of `keep`."""
    for name, target in find_targets(model).items():
        outputs, inputs = target.shape
        low = LowRankLinear.like(target.module, sizes.rank((inputs, outputs)))
        for factor in low.parameters():
            nn.init.normal_(factor, std=0.02)
        replace_module(model, name, low.requires_grad_(False))


def _training_pass(model: PreTrainedModel, batches: list[dict[str, Any]]) -> None:
    """Forward and backward over all weights, whose gradients are let go of."""
    model.requires_grad_(True)
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def _measuring(
    model: PreTrainedModel, batches: list[dict[str, Any]], config: CompressionConfig, labels: str
) -> Callable[[], Statistics]:
    return lambda: compute_statistics(model, batches, config.needs, labels=labels, progress=False)


def _repeated(layer: Callable[[Any], Any], x: Any) -> Callable[[], None]:
    def call() -> None:
        for _ in range(REPEATS):
            layer(x)

    return call


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _told(row: Figures) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
