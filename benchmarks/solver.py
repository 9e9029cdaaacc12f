"""TFWSVD's factors by alternating least squares against Adam, from the same start to the same weighted error."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Options, Result, Row, Spread, alternate, ratio
from benchmarks.models import random_importance, random_weight
from hf_lowrank.calibration import calibration_loader
from hf_lowrank.loading import load_model
from hf_lowrank.modeling_lowrank import dense_weight
from hf_lowrank.solvers.elementwise import ElementWise
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.statistics import compute_fisher
from hf_lowrank.targets import find_targets
from hf_lowrank.tasks import get_task

SHAPE, RANK, RANK_RATIO = (384, 1536), 101, 0.264
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ADAM_STEPS = 1_000
LONG_SWEEPS = 100
MARGIN = 1.001  # an error counts as reached within a tenth of a percent
REAL_LAYERS = 4
FISHER_SAMPLES = 256
TRACE_POINTS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)


@dataclass(frozen=True)
class Problem:
    """A weight [out, in] to factorize at `rank` under an importance of mean 1, and the common start."""

    name: str
    weight: Tensor
    objective: ElementWise
    rank: int

    @classmethod
    def of(cls, name: str, weight: Tensor, importance: Tensor, rank: int) -> "Problem":
        """The problem with its importance brought to mean 1, so that one learning rate has one meaning."""
        return cls(name, weight, ElementWise(importance / importance.mean()), rank)

    def start(self) -> Factors:
        """The two-sided closed form, balanced."""
        start = self.objective.two_sided().factorize(self.weight, self.rank).balanced()
        return Factors(start.up.float(), start.down.float())

    def ours(self, sweeps: int | None = None) -> Factors:
        """Our factors: at default settings, or after exactly this many sweeps."""
        if sweeps is None:
            return self.objective.factorize(self.weight, self.rank)
        exact = ElementWise(self.objective.importance, max_sweeps=sweeps, tolerance=float("-inf"))
        return exact.factorize(self.weight, self.rank)

    def error(self, factors: Factors) -> float:
        """The weighted squared error, relative to that of dropping the whole weight."""
        return float(self.objective.error(self.weight - factors.product()) / self.objective.error(self.weight))

    def adam(self, learning_rate: float) -> Iterator[float]:
        """The relative error before every step of Adam over both factors, step after step."""
        start, importance = self.start(), self.objective.importance
        whole = (importance * self.weight.square()).sum()
        factors = [start.up.requires_grad_(), start.down.requires_grad_()]
        optimizer = torch.optim.Adam(factors, lr=learning_rate)
        for _ in range(ADAM_STEPS + 1):
            residual = self.weight - factors[0] @ factors[1]
            loss = (importance * residual.square()).sum() / whole
            yield float(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def run(options: Options) -> Result:
    """Time to the same error, on a made-up layer and on real ones where a model is given."""
    made_up = Problem.of("made up", random_weight(*SHAPE), random_importance(*SHAPE), RANK)
    problems = [made_up, *(_real_problems(options) if options.model else [])]
    cases = [_measure(problem, options.rounds) for problem in problems]
    notes = [
        f"Reached: within {MARGIN - 1:.1%} of the error. Adam: the best of the learning rates "
        f"{', '.join(map(str, LEARNING_RATES))}, found beforehand at no cost to it, {ADAM_STEPS} steps at most; "
        "'>': not reached. Times of both contain their common start, the two-sided closed form.",
        *[line for _, figures in cases for line in _trace_lines(figures)],
    ]
    return Result(
        "solver: Adam against alternating least squares, weighted error relative to ‖W‖²",
        [row for rows, _ in cases for row in rows],
        notes,
        {"cases": [figures for _, figures in cases]},
    )


def _real_problems(options: Options) -> list[Problem]:
    """Layers of a real model, evenly spread over its depth and kinds, with the Fisher information of its own task."""
    assert options.model is not None
    assert options.task is not None
    task = get_task(options.task)
    model, tokenizer = load_model(options.model, task)
    loader = calibration_loader(model, tokenizer, task, options.data_dir, FISHER_SAMPLES)
    fisher = compute_fisher(model, loader, progress=False)
    targets = list(find_targets(model).items())
    chosen = [targets[n * (len(targets) - 1) // (REAL_LAYERS - 1)] for n in range(REAL_LAYERS)]
    problems = []
    for name, module in chosen:
        weight = dense_weight(module).detach().float()
        problems.append(Problem.of(name, weight, fisher.mean("fisher", name), round(RANK_RATIO * min(weight.shape))))
    return problems


def _measure(problem: Problem, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    ours, long = problem.ours(), problem.ours(LONG_SWEEPS)
    curves = {rate: list(problem.adam(rate)) for rate in LEARNING_RATES}
    best_adam = min(min(curve) for curve in curves.values())
    ends = {"ours, default": problem.error(ours), "best of either": min(problem.error(long), best_adam)}
    rows, figures = [], []
    for label, end in ends.items():
        row, figure = _race(problem, label, end, long.trace, curves, rounds)
        rows.append(row)
        figures.append(figure)
    needed = {rate: _steps_to(curve, ends["ours, default"]) for rate, curve in curves.items()}
    best = min(needed, key=lambda rate: needed[rate])
    return rows, {
        "layer": problem.name,
        "shape": list(problem.weight.shape),
        "rank": problem.rank,
        "sweeps at default": len(ours.trace) - 1,
        "races": figures,
        "steps by rate": needed,
        "best learning rate": best,
        "trace adam": curves[best],
        "trace ours": _relative(long.trace, problem.error(long)),
    }


def _race(
    problem: Problem,
    label: str,
    end: float,
    trace: tuple[float, ...],
    curves: dict[float, list[float]],
    rounds: int,
) -> tuple[Row, dict[str, Any]]:
    """Both run to the first point at which they reached `end`, in turns."""
    sweeps = _steps_to(_relative(trace, problem.error(problem.ours(len(trace) - 1))), end)
    rate = min(curves, key=lambda rate: _steps_to(curves[rate], end))
    steps = _steps_to(curves[rate], end)
    reached = {"ours": sweeps < len(trace), "adam": steps <= ADAM_STEPS}
    sweeps, steps = min(sweeps, len(trace) - 1), min(steps, ADAM_STEPS)
    seconds = alternate(
        {"ours": lambda: problem.ours(sweeps), "adam": lambda: _walk(problem.adam(rate), steps)}, rounds
    )
    quotient = ratio(seconds["adam"], seconds["ours"])
    below, above = "" if reached["ours"] else ">", "" if reached["adam"] else ">"
    row = {
        "layer": problem.name,
        "shape, rank": f"{problem.weight.shape[0]}×{problem.weight.shape[1]}, {problem.rank}",
        "to the error of": label,
        "error": f"{end:.5f}",
        "sweeps": f"{below}{sweeps}",
        "ours, s": f"{below}{Spread(tuple(seconds['ours'])).median:.3f}",
        "Adam's rate": f"{rate:g}",
        "steps": f"{above}{steps}",
        "Adam, s": f"{above}{Spread(tuple(seconds['adam'])).median:.2f}",
        "Adam / ours": f"{above}{quotient.text('{:.1f}')}",
    }
    return row, {
        "to": label,
        "error": end,
        "sweeps": sweeps,
        "steps": steps,
        "reached": reached,
        "learning_rate": rate,
        "seconds": seconds,
    }


def _walk(curve: Iterator[float], steps: int) -> None:
    """Take this many steps of Adam."""
    for step, _ in enumerate(curve):
        if step == steps:
            return


def _relative(trace: tuple[float, ...], last: float) -> list[float]:
    """Our trace in the unit of `Problem.error`, whose value at its end is `last`."""
    return [error / trace[-1] * last for error in trace]


def _steps_to(curve: Sequence[float], error: float) -> int:
    """The first index at which `error` is reached, or one past the end."""
    return next((step for step, value in enumerate(curve) if value <= error * MARGIN), len(curve))


def _trace_lines(figures: dict[str, Any]) -> list[str]:
    """What the table leaves out: both curves, when ours stops by itself, and what other learning rates take."""
    needed = [
        f"{rate}: {steps if steps <= ADAM_STEPS else 'never'}" for rate, steps in figures["steps by rate"].items()
    ]
    curves = {"ours, error after sweeps": figures["trace ours"], "Adam, error after steps": figures["trace adam"]}
    return [
        f"- {figures['layer']}: ours stops after {figures['sweeps at default']} sweeps; Adam's steps to its error by "
        f"learning rate – {', '.join(needed)}",
        *(f"  - {label} – {_points(curve)}" for label, curve in curves.items()),
    ]


def _points(curve: Sequence[float]) -> str:
    return ", ".join(f"{step}: {curve[step]:.5f}" for step in TRACE_POINTS if step < len(curve))
