"""What all optimizers share: their signature, the trace they leave with its stopping rule, and the dict of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_lowrank.errors import LowRankError

# Reading an error makes the host wait for an accelerator, so that there the stopping rule is applied only this often.
ACCELERATOR_INTERVAL = 4


@dataclass
class Trace:
    """What an optimizer did: after every iteration its error, its matrix products so far, and the time.

    A product is one of [out, in] by [in, rank] or as much arithmetic. The errors stay on the device until they are
    asked for. `patience` is the number of iterations over which the stopping rule looks for a decrease: 1 where every
    iteration decreases the error, more where an iteration is a small step or may increase it.
    """

    patience: int = 1
    errors: list[Tensor] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)  # what happened → after how many iterations

    def record(self, error: Tensor, products: float) -> None:
        """Add an iteration (first of all, the start) of so many more products, which led to the scalar `error`."""
        self.errors.append(error.detach())
        self.products.append(products + (self.products[-1] if self.products else 0))
        self.seconds.append(time.perf_counter())

    def converged(self, tolerance: float) -> bool:
        """Whether the lowest error fell by less than a share `tolerance` over the last `patience` iterations."""
        done = len(self.errors) - 1
        if done < self.patience or (self.errors[-1].device.type != "cpu" and done % ACCELERATOR_INTERVAL):
            return False
        errors = torch.stack(self.errors).nan_to_num(nan=float("inf"))
        before, lowest = errors[: -self.patience].min(), errors.min()
        return bool(before - lowest < tolerance * before)

    def values(self) -> list[float]:
        """The errors as numbers."""
        return torch.stack(self.errors).tolist()


class Solution(NamedTuple):
    """`up` [out, rank] and `down` [rank, in], and how they were found."""

    up: Tensor
    down: Tensor
    trace: Trace


class Optimizer(Protocol):
    """The signature of every optimizer."""

    def __call__(
        self, weight: Tensor, importance: Tensor, up: Tensor, down: Tensor, max_iterations: int, tolerance: float
    ) -> Solution:
        """Improve the factors `up` [out, rank] and `down` [rank, in] of `weight` [out, in], in float32.

        `importance` [out, in] is positive, of mean near 1. Ends after `max_iterations`, or when the relative decrease
        of the error is below `tolerance` (`Trace.converged`), which 0 never is.
        """


OPTIMIZERS: dict[str, Optimizer] = {}


def register(name: str) -> Callable:
    """Register the decorated function as the optimizer called `name`."""

    def add(function: Optimizer) -> Optimizer:
        if name in OPTIMIZERS:
            raise ValueError(f"an optimizer called {name!r} exists already")
        OPTIMIZERS[name] = function
        return function

    return add


def get_optimizer(name: str) -> Optimizer:
    """The optimizer called `name`.

    Raises:
        LowRankError: there is none; the message lists the names.
    """
    if name not in OPTIMIZERS:
        raise LowRankError(f"unknown optimizer {name!r}; the optimizers are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def damp_(gram: Tensor, share: float) -> Tensor:
    """Add this share of their mean to the diagonals of Gram matrices [..., n, n], in place; to zero matrices, of 1."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    diagonal.add_(share * torch.where(mean > 0, mean, 1.0))
    return gram


def weighted_error(importance: Tensor, residual: Tensor) -> Tensor:
    """Σ importance ∘ residual², a scalar, for two matrices [out, in]."""
    return (importance * residual * residual).sum()
