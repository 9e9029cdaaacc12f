"""The family of methods: the statistics of a layer → its objective. A dict and a decorator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers.elementwise import ElementWise
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.scaled import DiagonalScaling, Scaled, Scaling


class Objective(Protocol):
    """A weighted squared error of one layer's weight [out, in], and its best low-rank factors."""

    def error(self, delta: Tensor) -> Tensor:
        """The weighted squared error of a change `delta` [out, in], a scalar."""

    def spectrum(self, weight: Tensor) -> Tensor:
        """What each singular direction contributes to `error` when discarded [min(out, in)], largest first."""

    def factorize(self, weight: Tensor, rank: int) -> Factors:
        """Factors of least (or locally least) error."""


@dataclass(frozen=True)
class Method:
    """A member of the family: its objective as a formula, its source, and the statistics it needs."""

    name: str
    formula: str
    source: str
    needs: tuple[str, ...]
    objective: Callable[[dict[str, Tensor]], Objective]


METHODS: dict[str, Method] = {}


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        LowRankError: there is none; the message lists the names.
    """
    if name not in METHODS:
        raise LowRankError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


def method(name: str, formula: str, source: str, needs: tuple[str, ...] = ()) -> Callable:
    """Register the decorated function, from a layer's statistics by kind to its objective, as a method."""

    def register(objective: Callable[[dict[str, Tensor]], Objective]) -> Callable[[dict[str, Tensor]], Objective]:
        if name in METHODS:
            raise ValueError(f"a method called {name!r} exists already")
        METHODS[name] = Method(name, formula, source, needs, objective)
        return objective

    return register


@method("svd", "‖W − UD‖²", "Eckart & Young (1936)")
def svd(statistics: dict[str, Tensor]) -> Objective:
    return Scaled(Scaling(), Scaling())


@method(
    "fwsvd", "‖(W − UD) diag(√f)‖², f: Fisher information summed over outputs", "Hsu et al. (2022)", ("fisher_rows",)
)
def fwsvd(statistics: dict[str, Tensor]) -> Objective:
    return Scaled(Scaling(), DiagonalScaling(statistics["fisher_rows"]))


@method("tfwsvd", "Σ F ∘ (W − UD)², F: Fisher information of every element", "Hua et al. (2022)", ("fisher",))
def tfwsvd(statistics: dict[str, Tensor]) -> Objective:
    return ElementWise(statistics["fisher"])
