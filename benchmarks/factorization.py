"""What `compress` takes for ranks and factors against what it must: each layer scaled, squared and decomposed once."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Options, Result, Row, steady_clock
from hf_lowrank import METHODS, CompressionConfig, Statistics, compress
from hf_lowrank.model.targets import Target, find_targets
from hf_lowrank.model.weights import digest
from hf_lowrank.solvers.scaled import Scaled, lower_product

# All blocks are alike, so that a few of them have the ratio of many.
BLOCKS, WIDTH, INNER, TOKENS = 4, 1024, 2816, 4096
CONFIG = CompressionConfig("kfac", rank_ratio=0.33, sequential=False)
STEPS = ("scaling", "Gram matrix", "eigenvectors")

# How many blocks, and the (out, in) of the linear layers of each: those of Llama 3.
LARGER = {
    "8B": (32, [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]),
    "70B": (80, [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]),
}


def run(options: Options) -> Result:
    """Seconds of both for a Llama of random weights, in one run, and what that makes of the shapes of larger ones."""
    clock, model = steady_clock(), random_llama(BLOCKS)
    targets = find_targets(model)
    sums, shapes = random_statistics(targets), [target.shape for target in targets.values()]
    steps, singles = dict.fromkeys(STEPS, 0.0), dict.fromkeys(STEPS, 0.0)
    for name, target in targets.items():
        for found, dtype in ((steps, torch.float64), (singles, torch.float32)):
            for step, seconds in once(target, sums, name, clock, dtype).items():
                found[step] += seconds
    del targets, target
    started = clock()
    _, report = compress(model, CONFIG, sums, progress=False)
    seconds, least = clock() - started, sum(steps.values())
    rows = [_row(f"{BLOCKS} blocks, {WIDTH}/{INNER}", steps, seconds / least)]
    rows += [
        _row(name, projected(steps, shapes, blocks * block), seconds / least)
        for name, (blocks, block) in LARGER.items()
    ]
    mean = statistics.mean(layer.rank or 0 for layer in report.layers)
    clocked = "CPU seconds of one thread" if torch.get_num_threads() == 1 else "Seconds"
    notes = [
        f"{clocked}. Llama of random weights, {CONFIG.method} at a rank ratio of {CONFIG.rank_ratio}, on average "
        f"{mean:.0f}; moments of random inputs. Once: every layer's two sides scaled, the Gram matrix of the shorter "
        "one, and its eigenvectors, in float64. compress: the whole call, in float32 where that is as good: the steps "
        f"alone take {sum(singles.values()):.1f} s so, and compress {seconds / sum(singles.values()):.2f} times that.",
        "The larger ones, with the shapes of Llama 3, are projected: each step by its arithmetic, and compress by the "
        "ratio measured here.",
    ]
    figures: dict[str, Any] = {
        "steps": steps,
        "compress": seconds,
        "ratio": seconds / least,
        "steps in float32": singles,
    }
    return Result(f"factorization: {seconds / least:.2f} times every layer decomposed once", rows, notes, figures)


def random_llama(blocks: int) -> LlamaForCausalLM:
    """Of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=WIDTH // 64,
        vocab_size=1000,
    )
    return LlamaForCausalLM(config).eval()


def random_statistics(targets: Mapping[str, Target]) -> Statistics:
    """Moments of random inputs and gradients, the same for all sides of a width, as if measured on these layers."""
    moments = {size: random_moment(size) for size in (WIDTH, INNER)}
    sums = {
        "activation_moment": {name: moments[target.shape[1]] for name, target in targets.items()},
        "gradient_moment": {name: moments[target.shape[0]] for name, target in targets.items()},
        "activation_mean": {name: torch.zeros(target.shape[1]) for name, target in targets.items()},
        "active_tokens": {name: torch.tensor(float(TOKENS)) for name in targets},
    }
    return Statistics(sums, TOKENS, TOKENS, {name: digest(target.module) for name, target in targets.items()})


def random_moment(size: int) -> Tensor:
    """Σ x xᵀ [size, size] over random inputs of falling variances."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(TOKENS, size, generator=generator) * (1 + torch.arange(size) / 20) ** -0.5
    return x.T @ x


def once(
    target: Target, sums: Statistics, name: str, clock: Callable[[], float], dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of each step for one layer."""
    weight: Tensor = target.module.weight.detach().to(dtype)  # type: ignore[assignment, operator, union-attr]
    times = [clock()]
    means = {kind: sums.mean(kind, name) for kind in sums.kinds if kind != "activation_mean"}  # there is no bias
    objective = METHODS[CONFIG.method].objective(means)
    assert isinstance(objective, Scaled)
    _, half, whole = objective._scaled(weight)
    times.append(clock())
    gram = lower_product(whole, half)
    times.append(clock())
    torch.linalg.eigh(gram, UPLO="L")
    times.append(clock())
    return {step: times[n + 1] - times[n] for n, step in enumerate(STEPS)}


def projected(
    steps: Mapping[str, float], measured: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> dict[str, float]:
    """The seconds of each step for other layers, in proportion to its arithmetic."""
    return {
        step: seconds * sum(_arithmetic(step, shape) for shape in wanted) / sum(_arithmetic(step, s) for s in measured)
        for step, seconds in steps.items()
    }


def _arithmetic(step: str, shape: tuple[int, int]) -> float:
    """Up to a factor."""
    shorter, longer = sorted(shape)
    each = {
        "scaling": shorter**2 * longer + 2 * shorter * longer**2,
        "Gram matrix": shorter**2 * longer,
        "eigenvectors": shorter**3,
    }
    return each[step]


def _row(name: str, steps: Mapping[str, float], times: float) -> Row:
    least = sum(steps.values())
    unit, size = ("s", 1) if least < 3600 else ("h", 3600)
    shown = {step: f"{seconds / size:,.1f} {unit}" for step, seconds in steps.items()}
    return (
        {"model": name}
        | shown
        | {
            "once": f"{least / size:,.1f} {unit}",
            "compress": f"{least * times / size:,.1f} {unit}",
            "ratio": f"{times:.2f}",
        }
    )
