"""Every optimizer of the element-wise objective from the same start: error against seconds and matrix products."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.fisher import train_pass
from benchmarks.harness import Options, Result, Row, Spread, alternate, ratio
from benchmarks.models import random_importance, random_weight
from hf_lowrank.folder.loading import load_model
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.layers_lowrank import dense_weight
from hf_lowrank.solvers.elementwise import FLOOR, ElementWise
from hf_lowrank.solvers.optimizers import OPTIMIZERS, Solution
from hf_lowrank.statistics import Statistics, compute_fisher
from hf_lowrank.tasks import Task, get_task, load_split
from hf_lowrank.tasks.calibration import calibration_loader

SHAPE, RANK, RANK_RATIO = (384, 1536), 101, 0.33
LAYERS, FISHER_SAMPLES, EPOCH_SAMPLES = 4, 256, 320
DEFAULT, RIVALS = "alternating", ("adam", "adam-sgd")  # those of the papers race against the default
RATES = {"sgd": (0.03, 0.1, 0.3), "adam": (0.01, 0.03, 0.1), "adam-sgd": (0.01, 0.03, 0.1)}
ITERATIONS = {DEFAULT: 150, "als": 8, "em": 60, "em-nesterov": 60, "em-anderson": 60}
FIRST_ORDER_ITERATIONS = 500
MARGIN = 1.001  # an error counts as reached within a tenth of a percent
LEAST_EXCESS = 1e-5  # the lower end of the plot
# Okabe & Ito's colours, which the colour-blind can tell apart; members of a family differ in their dashes.
STYLES = {
    "alternating": ("#000000", "-"),
    "als": ("#009E73", "-"),
    "em": ("#56B4E9", "-"),
    "em-nesterov": ("#56B4E9", "--"),
    "em-anderson": ("#56B4E9", ":"),
    "sgd": ("#E69F00", "-"),
    "adam": ("#0072B2", "-"),
    "adam-sgd": ("#D55E00", "--"),
    "lbfgs": ("#CC79A7", "-"),
}


@dataclass(frozen=True)
class Curve:
    """Errors relative to Σ importance ∘ weight², lowest so far, with products and seconds since the call."""

    errors: list[float]
    products: list[float]
    seconds: list[float]
    rate: float | None = None
    events: dict[str, int] = field(default_factory=dict)

    def reaches(self, error: float) -> int | None:
        """The first iteration with an error within `MARGIN` of this one."""
        return next((step for step, value in enumerate(self.errors) if value <= error * MARGIN), None)

    def figures(self) -> dict[str, Any]:
        """For the JSON."""
        return {name: getattr(self, name) for name in ("rate", "events", "errors", "products", "seconds")}


@dataclass(frozen=True)
class Problem:
    """A `weight` [out, in] and `importance` [out, in] of mean 1, and the factors from which all start."""

    name: str
    weight: Tensor
    importance: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, name: str, weight: Tensor, importance: Tensor, rank: int) -> "Problem":
        """As `ElementWise` poses it."""
        start = ElementWise(importance).two_sided().factorize(weight, rank)
        importance = (importance / importance.mean()).clamp_min(FLOOR)
        return cls(name, weight, importance, start.up.float(), start.down.float())

    def curve(self, optimizer: str, rate: float | None, iterations: int, tolerance: float = 0.0) -> Curve:
        """What an optimizer does; first-order methods at this learning rate."""
        minimise: Callable[..., Solution] = OPTIMIZERS[optimizer]
        options = {} if rate is None else {"learning_rate": rate}
        whole = float((self.importance.double() * self.weight.double().square()).sum())
        started = time.perf_counter()
        trace = minimise(self.weight, self.importance, self.up, self.down, iterations, tolerance, **options).trace
        lowest = torch.tensor(trace.values()).nan_to_num(nan=float("inf")).cummin(dim=0).values / whole
        return Curve(lowest.tolist(), trace.products, [s - started for s in trace.seconds], rate, trace.events)


def run(options: Options) -> Result:
    """All optimizers on made-up layers, and on real ones where a model is given, with the cost of the whole step."""
    problems, notes, whole_step = list(_made_up()), [], {}
    if options.model is not None and options.task is not None:
        task = get_task(options.task)
        model, tokenizer = load_model(options.model, task)
        loader = calibration_loader(model, tokenizer, task, options.data_dir, max(FISHER_SAMPLES, EPOCH_SAMPLES))
        fisher = compute_fisher(model, list(loader)[: FISHER_SAMPLES // 16], progress=False)
        problems += _real(model, fisher, options.all_layers)
        samples = len(load_split(task, "train", options.data_dir))
        whole_step = _whole_step(model, fisher, list(loader), samples, options.rounds)
        notes.append(_whole_step_note(whole_step, task))
    measured = [_measure(problem, options.rounds) for problem in problems]
    path = options.output / "convergence.png"
    _plot({figures["layer"]: curves for _, figures, curves in measured}, path)
    return Result(
        "convergence: optimizers of Σ importance ∘ (W − up · down)², errors relative to Σ importance ∘ W²",
        [row for rows, _, _ in measured for row in rows],
        [
            f"Excess: of the lowest error over the lowest of any. Target: the error at which the default stops of its "
            f"own accord, reached within {MARGIN - 1:.1%}; – : not reached. Learning rates: best of "
            f"{'; '.join(f'{name} {rates}' for name, rates in RATES.items())}, by the products to the target, then the "
            "lowest error. The start's own time is in none. Curves: convergence.png.",
            *(race["text"] for _, figures, _ in measured for race in figures["races"].values()),
            *notes,
        ],
        {"layers": [figures for _, figures, _ in measured], "whole step": whole_step},
    )


def _made_up() -> Iterator[Problem]:
    weight, generator = random_weight(*SHAPE), torch.Generator().manual_seed(0)
    yield Problem.of("made up, moderate", weight, random_importance(*SHAPE), RANK)
    yield Problem.of("made up, heavy tails", weight, (2 * torch.randn(SHAPE, generator=generator)).exp(), RANK)


def _real(model: PreTrainedModel, fisher: Statistics, every: bool) -> Iterator[Problem]:
    """Layers evenly spread over the model's depth and kinds, or all."""
    targets = list(find_targets(model).items())
    count = len(targets) if every else LAYERS
    for name, target in (targets[n * (len(targets) - 1) // max(count - 1, 1)] for n in range(count)):
        weight = dense_weight(target.module).detach().float()
        yield Problem.of(name, weight, fisher.mean("fisher", name), round(RANK_RATIO * min(weight.shape)))


def _measure(problem: Problem, rounds: int) -> tuple[list[Row], dict[str, Any], dict[str, Curve]]:
    stopped = problem.curve(DEFAULT, None, 50, tolerance=1e-4)  # the defaults of ElementWise
    target = stopped.errors[-1]
    curves = {name: _best_curve(problem, name, target) for name in OPTIMIZERS}
    lowest = min(curve.errors[-1] for curve in curves.values())
    races = {rival: _race(problem, curves, rival, target, rounds) for rival in RIVALS}
    figures = {
        "layer": problem.name,
        "shape": list(problem.weight.shape),
        "rank": problem.up.shape[1],
        "sweeps at default": len(stopped.errors) - 1,
        "target": target,
        "lowest": lowest,
        "races": races,
        "curves": {name: curve.figures() for name, curve in curves.items()},
    }
    return [_row(problem, name, curve, target, lowest) for name, curve in curves.items()], figures, curves


def _best_curve(problem: Problem, name: str, target: float) -> Curve:
    iterations = ITERATIONS.get(name, FIRST_ORDER_ITERATIONS)
    curves = [problem.curve(name, rate, iterations) for rate in RATES.get(name, (None,))]

    def merit(curve: Curve) -> tuple[int, float]:
        step = curve.reaches(target)
        return iterations + 1 if step is None else step, curve.errors[-1]

    return min(curves, key=merit)


def _row(problem: Problem, name: str, curve: Curve, target: float, lowest: float) -> Row:
    step = curve.reaches(target)
    return {
        "layer": problem.name,
        "shape, rank": f"{problem.weight.shape[0]}×{problem.weight.shape[1]}, {problem.up.shape[1]}",
        "optimizer": name,
        "rate": "" if curve.rate is None else f"{curve.rate:g}",
        "iterations": str(len(curve.errors) - 1),
        "seconds": f"{curve.seconds[-1]:.2f}",
        "lowest error": f"{curve.errors[-1]:.5f}",
        "excess": f"{curve.errors[-1] / lowest - 1:.2%}",
        "target": f"{target:.5f}",
        "iterations to it": "–" if step is None else str(step),
        "products": "–" if step is None else f"{curve.products[step]:.0f}",
        "seconds to it": "–" if step is None else f"{curve.seconds[step]:.3f}",
    }


def _race(problem: Problem, curves: dict[str, Curve], rival: str, target: float, rounds: int) -> dict[str, Any]:
    """The default and a rival in turns, to the target and to the lowest error that the rival reached."""
    other, default = curves[rival], curves[DEFAULT]
    results, texts = {}, []
    for label, error in {"target": target, f"lowest of {rival}": other.errors[-1]}.items():
        steps = {DEFAULT: default.reaches(error), rival: other.reaches(error)}
        done = {name: len(curves[name].errors) - 1 if step is None else step for name, step in steps.items()}
        calls = {name: partial(problem.curve, name, curves[name].rate, done[name]) for name in done}
        seconds = alternate(calls, rounds)
        quotient = ratio(seconds[rival], seconds[DEFAULT])
        sign = ("" if steps[rival] is not None else ">") + ("" if steps[DEFAULT] is not None else "<")
        results[label] = {"error": error, "steps": steps, "seconds": seconds, "ratio": quotient.values}
        texts.append(f"{sign}{quotient.text('{:.1f}')} to the {label} ({error:.5f})")
    return results | {"text": f"{problem.name}: seconds of {rival} / {DEFAULT}: {', '.join(texts)}."}


def _whole_step(
    model: PreTrainedModel, fisher: Statistics, batches: list[Any], samples: int, rounds: int
) -> dict[str, Any]:
    """TFWSVD's factors of every layer against an epoch of training, without optimizer steps, from a part of one."""
    targets = find_targets(model)

    def factorize() -> None:
        for name, target in targets.items():
            weight = dense_weight(target.module).detach()
            ElementWise(fisher.mean("fisher", name)).factorize(weight, round(RANK_RATIO * min(weight.shape)))

    part = sum(len(batch["labels"]) for batch in batches)
    seconds = alternate({"factorize": factorize, "part": lambda: train_pass(model, batches)}, rounds)
    epoch = [taken * samples / part for taken in seconds["part"]]
    return {"layers": len(targets), "factorize": seconds["factorize"], "epoch": epoch, "samples": samples, "part": part}


def _whole_step_note(whole: dict[str, Any], task: Task) -> str:
    share = ratio(whole["factorize"], whole["epoch"]).text("{:.1%}")
    return (
        f"The whole step, {whole['layers']} layers at rank ratio {RANK_RATIO}: "
        f"{Spread(tuple(whole['factorize'])).text()} s; an epoch of {task.name} ({whole['samples']} samples; forward "
        f"and backward in batches of 16 sorted by length, from {whole['part']} of them): "
        f"{Spread(tuple(whole['epoch'])).text('{:.0f}')} s; ratio {share}."
    )


def _plot(layers: dict[str, dict[str, Curve]], path: Path) -> None:
    """Excess over the lowest error of any, against seconds and against products; a column for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(layers), figsize=(3.4 * len(layers) + 1.6, 6.8), sharey=True, squeeze=False, layout="constrained"
    )
    for column, (layer, curves) in enumerate(layers.items()):
        lowest = min(curve.errors[-1] for curve in curves.values())
        for row, quantity in enumerate(("seconds", "products")):
            axis = axes[row][column]
            for name, curve in curves.items():
                colour, dashes = STYLES[name]
                excess = [max(error / lowest - 1, LEAST_EXCESS) for error in curve.errors]
                width = 2.6 if name == DEFAULT else 1.5
                axis.plot(getattr(curve, quantity), excess, color=colour, linestyle=dashes, linewidth=width, label=name)
            axis.set(xscale="log", yscale="log", xlabel="seconds" if quantity == "seconds" else "matrix products")
            axis.grid(alpha=0.3)
        axes[0][column].set_title(layer.removeprefix("bert.encoder."), fontsize=9)
    for row in axes:
        row[0].set_ylabel("error above the lowest of any (relative)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
