"""Expectation maximisation: fill the matrix in, take its truncated SVD, and so on. Srebro & Jaakkola (2003)."""

import torch
from torch import Tensor

from hf_lowrank.solvers.optimizers.registry import Solution, Trace, damp_, register, weighted_error
from hf_lowrank.solvers.scaled import truncated_svd

MEMORY = 5  # steps that Anderson's method mixes
DAMPING = 1e-8  # of its least squares, relative to their scale


@register("em")
def em(weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, max_iterations: int, tolerance: float) -> Solution:
    """X ← SVD_rank(p ∘ weight + (1 − p) ∘ X), with p the importance divided by its maximum. Never increases the error.

    As if of 1/p copies of an element one were observed: slow where the importance is heavy-tailed and most p are small.
    """
    share = importance / importance.max()
    trace = _begin(weight, importance, up, down)
    for _ in range(max_iterations):
        up, down = em_step(weight, share, up @ down, up.shape[1])
        trace.record(weighted_error(importance, weight - up @ down), _products(weight, up.shape[1]))
        if trace.converged(tolerance):
            break
    return Solution(up, down, trace)


@register("em-nesterov")
def em_nesterov(
    weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, max_iterations: int, tolerance: float
) -> Solution:
    """EM from a point extrapolated by Nesterov's momentum, which restarts when the error would rise.

    EM is projected gradient descent of step 1 / max importance, so Nesterov's (1983) momentum applies; the restart is
    that of O'Donoghue & Candès (2015). A step that would raise the error is not taken, so the error never rises.
    """
    share = importance / importance.max()
    trace = _begin(weight, importance, up, down, patience=2)  # a restart takes one iteration
    current = previous = up @ down
    error, age = trace.errors[0], torch.zeros((), device=weight.device)
    for _ in range(max_iterations):
        ahead = current + age / (age + 3) * (current - previous)
        new_up, new_down = em_step(weight, share, ahead, up.shape[1])
        product = new_up @ new_down
        new_error = weighted_error(importance, weight - product)
        success = new_error <= error
        up, down = torch.where(success, new_up, up), torch.where(success, new_down, down)
        previous, current = current, torch.where(success, product, current)
        age = torch.where(success, age + 1, 0.0)
        error = torch.minimum(error, new_error)
        trace.record(error, _products(weight, up.shape[1]))
        if trace.converged(tolerance):
            break
    return Solution(up, down, trace)


@register("em-anderson")
def em_anderson(
    weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, max_iterations: int, tolerance: float
) -> Solution:
    """EM as a fixed-point iteration of the filled-in matrix Z, mixed over its last `MEMORY` steps (Anderson, 1965).

    A mixture that would raise the error is replaced by the latest plain step, and the memory is cleared.
    """
    share = importance / importance.max()
    trace = _begin(weight, importance, up, down, patience=2)  # a restart takes one iteration
    points: list[Tensor] = []
    images: list[Tensor] = []
    filled = _fill(weight, share, up @ down)
    for _ in range(max_iterations):
        new_up, new_down = truncated_svd(filled, up.shape[1])
        new_up, new_down = new_up.to(up.dtype), new_down.to(up.dtype)
        error = weighted_error(importance, weight - new_up @ new_down)
        if error > trace.errors[-1]:
            filled, points, images = _fill(weight, share, up @ down), [], []
            trace.record(trace.errors[-1], _products(weight, up.shape[1]))
            continue
        up, down = new_up, new_down
        trace.record(error, _products(weight, up.shape[1]))
        if trace.converged(tolerance):
            break
        points, images = [*points, filled][-MEMORY:], [*images, _fill(weight, share, up @ down)][-MEMORY:]
        filled = _mix(points, images)
    return Solution(up, down, trace)


def em_step(weight: Tensor, share: Tensor, product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of SVD_rank(share ∘ weight + (1 − share) ∘ product); all matrices [out, in], 0 < share ≤ 1."""
    up, down = truncated_svd(_fill(weight, share, product), rank)
    return up.to(weight.dtype), down.to(weight.dtype)


def _fill(weight: Tensor, share: Tensor, product: Tensor) -> Tensor:
    return product + share * (weight - product)


def _mix(points: list[Tensor], images: list[Tensor]) -> Tensor:
    """The affine combination of the images [out, in] whose steps, combined likewise, are least in norm."""
    steps = torch.stack([(image - point).flatten() for point, image in zip(points, images, strict=True)]).double()
    gram = damp_(steps @ steps.T, DAMPING)
    shares = torch.linalg.solve(gram, torch.ones_like(gram[0]))
    shares = (shares / shares.sum()).to(images[0].dtype)
    return torch.einsum("k,kij->ij", shares, torch.stack(images))


def _begin(weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, patience: int = 1) -> Trace:
    trace = Trace(patience)
    trace.record(weighted_error(importance, weight - up @ down), 1)
    return trace


def _products(weight: Tensor, rank: int) -> float:
    """One iteration in products: `up @ down`, the Gram matrix and its eigenvectors (some 9 n³), the projection."""
    shorter, longer = sorted(weight.shape)
    return 2 + shorter / rank + 4.5 * shorter**2 / (longer * rank)
