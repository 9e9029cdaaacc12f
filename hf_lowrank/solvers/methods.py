"""The family of methods: the statistics of a layer → its objective. A dict and a decorator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers.elementwise import ElementWise, Rotated
from hf_lowrank.solvers.factors import Factors
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


@dataclass(frozen=True)
class Method:
    """A member of the family: its objective as a formula, its source, and the statistics it needs.

    `allocation` is how ranks are spread over layers unless said otherwise. Errors `in_loss_units` are twice the
    expected increase of the loss, so that layers can be compared; others are brought to that unit by `loss_per_error`.
    A method that `iterates` has no closed form, and a choice of optimizers.
    """

    name: str
    formula: str
    source: str
    needs: tuple[str, ...]
    allocation: str
    in_loss_units: bool
    iterates: bool
    objective: Callable[[Means], Objective]

    def needs_for(self, losses: bool) -> tuple[str, ...]:
        """The statistics that the method needs; with `losses`, also to say what loss an error means."""
        unit = () if self.in_loss_units or not losses else LOSS_UNIT
        return tuple(dict.fromkeys([*self.needs, *unit]))


METHODS: dict[str, Method] = {}

# What turns the error of an objective in other units into loss.
LOSS_UNIT = ("fisher_rows",)


def loss_per_error(objective: Objective, fisher_rows: Tensor, shape: tuple[int, int]) -> float:
    """Twice the expected increase of the loss per error: a random change costs what the Fisher information says.

    To second order a change with independent elements of variance 1 adds Σ F / 2 to the loss; `fisher_rows` [in] is F
    summed over outputs.
    """
    mass = float(objective.mass(shape))
    return float(fisher_rows.double().sum()) / mass if mass > 0 else 0.0


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        LowRankError: there is none; the message lists the names.
    """
    if name not in METHODS:
        raise LowRankError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


def method(
    name: str,
    formula: str,
    source: str,
    needs: tuple[str, ...] = (),
    allocation: str = "uniform",
    in_loss_units: bool = False,
    iterates: bool = False,
) -> Callable:
    """Register the decorated function, from a layer's statistics by kind to its objective, as a method."""

    def register(objective: Callable[[Means], Objective]) -> Callable[[Means], Objective]:
        if name in METHODS:
            raise ValueError(f"a method called {name!r} exists already")
        METHODS[name] = Method(name, formula, source, needs, allocation, in_loss_units, iterates, objective)
        return objective

    return register


# Damping of second moments, as shares of their mean diagonal.
ACTIVATION_DAMPING, GRADIENT_DAMPING = 1e-3, 1e-2


@method("svd", "‖Δ‖²", "Eckart & Young (1936)")
def svd(statistics: Means) -> Objective:
    """Every element counts the same."""
    return Scaled(Scaling(), Scaling())


@method("fwsvd", "‖Δ diag(√f)‖², f = Σ_out F", "FWSVD, Hsu et al. (2022)", ("fisher_rows",))
def fwsvd(statistics: Means) -> Objective:
    """An input counts by its Fisher information, summed over outputs."""
    return Scaled(Scaling(), DiagonalScaling(statistics["fisher_rows"]))


@method(
    "fwsvd2", "‖diag(√r) Δ diag(√f)‖², r fᵀ ≈ F", "the rank-1 Fisher, in closed form", ("fisher",), in_loss_units=True
)
def fwsvd2(statistics: Means) -> Objective:
    """An element counts by the product of its row's and its column's Fisher information."""
    return ElementWise(statistics["fisher"]).two_sided()


@method("tfwsvd", "Σ F ∘ Δ²", "TFWSVD, Hua et al. (2022)", ("fisher",), in_loss_units=True, iterates=True)
def tfwsvd(statistics: Means) -> Objective:
    """Every element counts by its own Fisher information."""
    return ElementWise(statistics["fisher"])


@method("asvd", "‖Δ diag(√a)‖², a = mean |x|", "ASVD, Yuan et al. (2023), α = 1/2", ("activation_magnitude",))
def asvd(statistics: Means) -> Objective:
    """An input counts by its mean magnitude."""
    return Scaled(Scaling(), DiagonalScaling(statistics["activation_magnitude"]))


@method("whiten", "E‖Δ x‖²", "DRONE, Chen et al. (2021); SVD-LLM, Wang et al. (2024)", ("activation_moment",))
def whiten(statistics: Means) -> Objective:
    """The change of the layer's output counts, over the inputs that occur."""
    return Scaled(Scaling(), whitening(statistics["activation_moment"], ACTIVATION_DAMPING))


@method(
    "whiten-diag",
    "E‖diag(√γ) Δ x‖², γ = E g²",
    "whitening × output gradients",
    ("activation_moment", "gradient_moment", "active_tokens"),
    "greedy",
    in_loss_units=True,
)
def whiten_diag(statistics: Means) -> Objective:
    """As `whiten`, each output weighted by its mean squared gradient."""
    return Scaled(DiagonalScaling(statistics["gradient_moment"].diagonal()), _inputs_per_token(statistics))


@method(
    "kfac",
    "E[tr Δᵀ G Δ A], G = E g gᵀ, A = E x xᵀ",
    "K-FAC, Martens & Grosse (2015)",
    ("activation_moment", "gradient_moment", "active_tokens"),
    "greedy",
    in_loss_units=True,
)
def kfac(statistics: Means) -> Objective:
    """The expected squared change of the loss, with inputs and output gradients taken as independent."""
    return Scaled(WhiteningScaling(statistics["gradient_moment"], GRADIENT_DAMPING), _inputs_per_token(statistics))


@method(
    "gfwsvd",
    "tr Δᵀ B Δ A, A ⊗ B the nearest Kronecker product to E[vec G_n vec G_nᵀ]",
    "GFWSVD, Chekalina et al. (2025)",
    ("kronecker_in", "kronecker_out", "fisher_sketch"),
    "greedy",
)
def gfwsvd(statistics: Means) -> Objective:
    """As `kfac`, with the factors that come closest to the Fisher information of whole samples, found by iteration."""
    inputs = WhiteningScaling(statistics["kronecker_in"], ACTIVATION_DAMPING)
    return Scaled(WhiteningScaling(statistics["kronecker_out"], GRADIENT_DAMPING), inputs)


@method(
    "ekfac",
    "Σ F' ∘ (Q_Gᵀ Δ Q_A)², F' = E (Q_Gᵀ G_n Q_A)²",
    "EK-FAC, George et al. (2018)",
    ("activation_moment", "gradient_moment", "fisher_in_eigenbasis"),
    "greedy",
    in_loss_units=True,
    iterates=True,
)
def ekfac(statistics: Means) -> Objective:
    """Every element counts by its own Fisher information, in the basis where inputs and gradients are uncorrelated."""
    basis = eigenbasis(statistics["gradient_moment"], statistics["activation_moment"])
    return Rotated(ElementWise(statistics["fisher_in_eigenbasis"]), *basis)


def _inputs_per_token(statistics: Means) -> Scaling:
    """A = E x xᵀ over tokens; with G added up over a sample's tokens, errors are in units of loss."""
    tokens = statistics["active_tokens"].clamp_min(1)
    return whitening(statistics["activation_moment"] / tokens, ACTIVATION_DAMPING)
