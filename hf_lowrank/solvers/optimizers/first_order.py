"""Optimizers of `torch.optim` over both factors: SGD, Adam, the hybrid of the two, and L-BFGS.

They start at factors of equal singular values, and all but L-BFGS return the best factors that they came across.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.optimizers.registry import Solution, Trace, register, weighted_error

PRODUCTS = 3  # of an evaluation: up @ down, and two for the gradient
PATIENCE = 30  # single steps change little, and may go up
MOMENTUM = 0.9
SWITCH_AFTER = 30  # steps at least, in which Adam's running averages settle
INTERVAL = 10  # steps from one look at what happened to the next
DIVERGED, SLOWER = 1.1, 0.25  # SGD at this multiple of its lowest error returns there, for this share of its rate
HISTORY = 10
LINE_SEARCH = 25  # evaluations at most

AfterStep = Callable[[int], None]


class Point:
    """The factors as parameters of a `torch.optim` optimizer, the gradient of the error, and the best so far."""

    def __init__(self, weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, patience: int = PATIENCE) -> None:
        self.weight, self.importance = weight, importance
        start = Factors(up, down).balanced()
        self.up, self.down = start.up.clone(), start.down.clone()
        self.best_up, self.best_down = start.up, start.down
        self.lowest = torch.full((), float("inf"), device=weight.device)
        self.trace = Trace(patience)

    @property
    def parameters(self) -> list[Tensor]:
        """`up` [out, rank] and `down` [rank, in], which an optimizer changes in place."""
        return [self.up, self.down]

    def entry_scale(self) -> float:
        """The root mean square of the entries of both factors: Adam's steps are relative to it."""
        return float(torch.cat([factor.flatten() for factor in self.parameters]).square().mean().sqrt())

    def curvature(self) -> float:
        """The curvature of the error along one factor, about: the scale of SGD's steps is its inverse."""
        largest = torch.linalg.matrix_norm(self.up.double(), 2) ** 2
        heaviest = max(self.importance.mean(dim=0).max(), self.importance.mean(dim=1).max())
        return float(2 * largest * heaviest)

    def evaluate(self) -> Tensor:
        """Set the gradients and return the error, a scalar; it is recorded, as an iteration."""
        error = self._differentiate()
        better = error < self.lowest
        self.best_up = torch.where(better, self.up, self.best_up)
        self.best_down = torch.where(better, self.down, self.best_down)
        self.lowest = torch.where(better, error, self.lowest)
        self.trace.record(error, PRODUCTS)
        return error

    def _differentiate(self) -> Tensor:
        residual = self.weight - self.up @ self.down
        weighted = self.importance * residual
        self.up.grad, self.down.grad = -2 * weighted @ self.down.T, -2 * self.up.T @ weighted
        return (weighted * residual).sum()

    def descend(
        self, optimizer: torch.optim.Optimizer, steps: int, tolerance: float, after_step: AfterStep | None = None
    ) -> bool:
        """Take these steps at most; whether the stopping rule ended them. The current point is already evaluated."""
        for step in range(1, steps + 1):
            optimizer.step()
            if after_step:
                after_step(step)
            self.evaluate()
            if self.trace.converged(tolerance):
                return True
        return False

    def descend_by_sgd(self, rate: float, steps: int, tolerance: float) -> None:
        """Take these steps of SGD at most, from the best point at a lower rate whenever they diverge."""
        optimizer = torch.optim.SGD(self.parameters, lr=rate, momentum=MOMENTUM)
        for done in range(0, steps, INTERVAL):
            if self.descend(optimizer, min(INTERVAL, steps - done), tolerance):
                return
            if not self.trace.errors[-1] <= DIVERGED * self.lowest:  # a nan diverged too
                self.up.copy_(self.best_up)
                self.down.copy_(self.best_down)
                self._differentiate()
                rate *= SLOWER
                optimizer = torch.optim.SGD(self.parameters, lr=rate, momentum=MOMENTUM)

    def solution(self) -> Solution:
        """The best factors so far."""
        return Solution(self.best_up, self.best_down, self.trace)


@register("sgd")
def sgd(
    weight: Tensor,
    importance: Tensor,
    up: Tensor,
    down: Tensor,
    max_iterations: int,
    tolerance: float,
    learning_rate: float = 0.1,
) -> Solution:
    """Gradient descent with momentum; the `learning_rate` is relative to the inverse curvature at the start."""
    point = Point(weight, importance, up, down)
    point.evaluate()
    point.descend_by_sgd(learning_rate / (point.curvature() or 1.0), max_iterations, tolerance)
    return point.solution()


@register("adam")
def adam(
    weight: Tensor,
    importance: Tensor,
    up: Tensor,
    down: Tensor,
    max_iterations: int,
    tolerance: float,
    learning_rate: float = 0.03,
) -> Solution:
    """Adam; the `learning_rate` is relative to the root mean square of the factors' entries at the start."""
    point = Point(weight, importance, up, down)
    point.evaluate()
    point.descend(torch.optim.Adam(point.parameters, lr=learning_rate * point.entry_scale()), max_iterations, tolerance)
    return point.solution()


@register("adam-sgd")
def adam_sgd(
    weight: Tensor,
    importance: Tensor,
    up: Tensor,
    down: Tensor,
    max_iterations: int,
    tolerance: float,
    learning_rate: float = 0.03,
) -> Solution:
    """Adam, then SGD: the optimizer of TFWSVD, Hua et al. (2022), a reconstruction.

    Their switching rule is known to us in outline only. This one is that of SWATS, Keskar & Socher (2017): Adam's step
    p is projected on the gradient g to a learning rate γ = pᵀp / −pᵀg, and SGD takes over with the running average of γ
    once γ meets it. `Trace.events` says after how many steps. Where the importance is heavy-tailed that rate can be far
    too high, so that SGD lowers it when it diverges, which is ours.
    """
    point = Point(weight, importance, up, down)
    point.evaluate()
    optimizer = torch.optim.Adam(point.parameters, lr=learning_rate * point.entry_scale())
    rule = ProjectionRule(point, *optimizer.defaults["betas"])
    done = 0
    while done < max_iterations and not rule.fired():
        steps = min(INTERVAL, max_iterations - done)
        if point.descend(optimizer, steps, tolerance, rule.after_step):
            return point.solution()
        done += steps
    if done < max_iterations:
        point.trace.events["switch to SGD"] = done
        point.descend_by_sgd(rule.learning_rate(), max_iterations - done, tolerance)
    return point.solution()


class ProjectionRule:
    """The switch of SWATS: when it fires, and the learning rate for SGD. It stays on the device until asked.

    Theirs fires when γ is within 1e-9 of its average. Here, without noise and whatever the unit of γ, it fires when γ
    crosses its average.
    """

    def __init__(self, point: Point, beta1: float, beta2: float) -> None:
        self.point, self.beta1, self.beta2 = point, beta1, beta2
        self.before = [parameter.clone() for parameter in point.parameters]
        self.average = torch.zeros((), device=point.weight.device)
        self.latched = torch.zeros((), device=point.weight.device)  # the rate when it fired, 0 before
        self.above = torch.zeros((), device=point.weight.device, dtype=torch.bool)
        self.steps = 0

    def after_step(self, step: int) -> None:
        """Take notice of the optimizer's latest step, while the gradients are still those before it."""
        self.steps += 1
        step_square, slope = torch.zeros_like(self.average), torch.zeros_like(self.average)
        for before, parameter in zip(self.before, self.point.parameters, strict=True):
            change = parameter - before
            before.copy_(parameter)
            assert parameter.grad is not None
            step_square, slope = step_square + change.square().sum(), slope - (change * parameter.grad).sum()
        rate = step_square / slope
        usable = torch.isfinite(rate) & (rate > 0)
        self.average = self.beta2 * self.average + (1 - self.beta2) * torch.where(usable, rate, self.average)
        corrected = self.average / (1 - self.beta2**self.steps)
        above = torch.where(usable, rate > corrected, self.above)
        if self.steps > SWITCH_AFTER:
            self.latched = torch.where((above != self.above) & (self.latched == 0), corrected, self.latched)
        self.above = above

    def fired(self) -> bool:
        """Whether the rule was met at any step so far."""
        return bool(self.latched > 0)

    def learning_rate(self) -> float:
        """That of SGD: the projection allows for momentum by 1 − β₁."""
        return (1 - self.beta1) * float(self.latched)


@register("lbfgs")
def lbfgs(
    weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, max_iterations: int, tolerance: float
) -> Solution:
    """L-BFGS with a strong Wolfe line search; an iteration is an evaluation of the error and its gradient."""
    point = Point(weight, importance, up, down)
    scale = float(weighted_error(importance, weight)) or 1.0

    def closure() -> float:
        error = float(point.evaluate()) / scale
        for parameter in point.parameters:
            assert parameter.grad is not None
            parameter.grad /= scale
        return error

    optimizer = torch.optim.LBFGS(
        point.parameters,
        max_iter=1,
        max_eval=LINE_SEARCH,
        history_size=HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    while len(point.trace.errors) <= max_iterations:
        optimizer.step(closure)
        if point.trace.converged(tolerance):
            break
    return point.solution()
