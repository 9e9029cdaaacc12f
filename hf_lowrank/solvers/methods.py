"""The objective of every method: the statistics of a layer → its weighted squared error. A dict and a decorator."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from hf_lowrank.solvers.decomposition import Decomposition
from hf_lowrank.solvers.elementwise import ElementWise, Rotated
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.family import METHODS, Method
from hf_lowrank.solvers.scaled import DiagonalScaling, Scaled, Scaling, WhiteningScaling, whitening
from hf_lowrank.statistics.eigenbasis import eigenbasis

Means = dict[str, Tensor]  # of one layer, by kind, over samples


class Objective(Protocol):
    """A weighted squared error of one layer's weight [out, in], and its best low-rank factors."""

    def error(self, delta: Tensor) -> Tensor:
        """The weighted squared error of a change `delta` [out, in], a scalar."""

    def mass(self, shape: tuple[int, int]) -> Tensor:
        """The expected `error` of a change (out, in) whose elements are independent with variance 1, a scalar."""

    def spectrum(self, weight: Tensor) -> Tensor:
        """What each singular direction contributes to `error` when discarded [min(out, in)], largest first."""

    def factorize(self, weight: Tensor, rank: int) -> Factors:
        """Factors of least (or locally least) error."""

    def two_sided(self) -> Scaled:
        """The error, or what comes close to it, as ‖L Δ Rᵀ‖²: for the gauge of the factors, and for rounding."""


OBJECTIVES: dict[str, Callable[[Means], Objective]] = {}


def loss_per_error(objective: Objective | Decomposition, fisher_rows: Tensor, shape: tuple[int, int]) -> float:
    """Twice the expected increase of the loss per error: a random change costs what the Fisher information says.

    To second order a change with independent elements of variance 1 adds Σ F / 2 to the loss; `fisher_rows` [in] is F
    summed over outputs.
    """
    mass = float(objective.mass(shape))
    return float(fisher_rows.double().sum()) / mass if mass > 0 else 0.0


def objective_of(name: str) -> Callable:
    """Register the decorated function, from a layer's statistics by kind to its objective, as that of a method."""

    def register(function: Callable[[Means], Objective]) -> Callable[[Means], Objective]:
        OBJECTIVES[name] = function
        return function

    return register


def method(
    name: str,
    formula: str,
    source: str,
    needs: tuple[str, ...] = (),
    allocation: str = "uniform",
    in_loss_units: bool = False,
    iterates: bool = False,
    labels: str = "data",
) -> Callable:
    """Add a method of one's own: the decorated function becomes the objective of a new member of the family."""
    if name in METHODS:
        raise ValueError(f"a method called {name!r} exists already")
    METHODS[name] = Method(name, formula, source, needs, allocation, in_loss_units, iterates, labels)
    return objective_of(name)


# Damping of second moments, as shares of their mean diagonal.
ACTIVATION_DAMPING, GRADIENT_DAMPING = 1e-3, 1e-2


@objective_of("svd")
def svd(statistics: Means) -> Objective:
    """Every element counts the same."""
    return Scaled(Scaling(), Scaling())


@objective_of("fwsvd")
def fwsvd(statistics: Means) -> Objective:
    """An input counts by its Fisher information, summed over outputs."""
    return Scaled(Scaling(), DiagonalScaling(statistics["fisher_rows"]))


@objective_of("fwsvd2")
def fwsvd2(statistics: Means) -> Objective:
    """An element counts by the product of its row's and its column's Fisher information."""
    return ElementWise(statistics["fisher"]).two_sided()


@objective_of("tfwsvd")
def tfwsvd(statistics: Means) -> Objective:
    """Every element counts by its own Fisher information."""
    return ElementWise(statistics["fisher"])


@objective_of("asvd")
def asvd(statistics: Means) -> Objective:
    """An input counts by its mean magnitude."""
    return Scaled(Scaling(), DiagonalScaling(statistics["activation_magnitude"]))


@objective_of("whiten")
def whiten(statistics: Means) -> Objective:
    """The change of the layer's output counts, over the inputs that occur."""
    return Scaled(Scaling(), _inputs(statistics))


@objective_of("whiten-diag")
def whiten_diag(statistics: Means) -> Objective:
    """As `whiten`, each output weighted by its mean squared gradient."""
    return Scaled(DiagonalScaling(statistics["gradient_moment"].diagonal()), _inputs(statistics))


@objective_of("kfac")
def kfac(statistics: Means) -> Objective:
    """The expected squared change of the loss, with inputs and output gradients taken as independent."""
    return Scaled(WhiteningScaling(statistics["gradient_moment"], GRADIENT_DAMPING), _inputs(statistics))


@objective_of("gfwsvd")
def gfwsvd(statistics: Means) -> Objective:
    """As `kfac`, with the factors that come closest to the Fisher information of whole samples, found by iteration."""
    inputs = WhiteningScaling(statistics["kronecker_in"], ACTIVATION_DAMPING)
    return Scaled(WhiteningScaling(statistics["kronecker_out"], GRADIENT_DAMPING), inputs)


@objective_of("ekfac")
def ekfac(statistics: Means) -> Objective:
    """Every element counts by its own Fisher information, in the basis where inputs and gradients are uncorrelated."""
    basis = eigenbasis(statistics["gradient_moment"], statistics["activation_moment"])
    return Rotated(ElementWise(statistics["fisher_in_eigenbasis"]), *basis)


def _inputs(statistics: Means) -> Scaling:
    """A = E (x − μ)(x − μ)ᵀ over tokens; with G added up over a sample's tokens, errors are in units of loss.

    The mean costs nothing, as the bias makes up for what a change does to it (see `mean_input`). Without the statistic
    "activation_mean", as of a layer without a bias, μ is 0.
    """
    moment, mean = statistics["activation_moment"], mean_input(statistics)
    moment = moment / statistics["active_tokens"].clamp_min(1)
    if mean is not None:
        moment = moment.double() - mean.outer(mean)
    return whitening(moment, ACTIVATION_DAMPING)


def mean_input(statistics: Means) -> Tensor | None:
    """μ = E x over tokens [in], in float64; None where the mean counts like any other part of the input.

    A change Δ of the weight, for which Δ μ is added to the bias, changes outputs by Δ (x − μ).
    """
    if "activation_mean" not in statistics:
        return None
    return statistics["activation_mean"].double() / statistics["active_tokens"].clamp_min(1)


def rounding_sides(method: Method, statistics: Means) -> Scaled:
    """The two-sided error of a method over whole inputs, their mean included, whatever the method makes of it.

    It is part of the ranges that are rounded, and of what a rounded weight changes.
    """
    return method.objective({kind: mean for kind, mean in statistics.items() if kind != "activation_mean"}).two_sided()
