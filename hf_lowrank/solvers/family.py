"""The family of methods: what each minimises and needs, what it costs, where it comes from. No tensors: names, as data.

The objectives themselves are in `methods.py`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_lowrank.errors import LowRankError

if TYPE_CHECKING:
    from hf_lowrank.solvers.methods import Means, Objective

# What turns the error of an objective in other units into loss.
LOSS_UNIT = ("fisher_rows",)


@dataclass(frozen=True)
class Method:
    """A member of the family: its objective as a formula, its source, and the statistics it needs.

    Args:
        name: what it is called.
        formula: the error of a change Δ [out, in] that it minimises.
        source: the paper.
        needs: the statistics that its objective takes, names in `KINDS`.
        allocation: how ranks are spread over layers unless said otherwise, a name in `ALLOCATIONS`.
        in_loss_units: whether errors are twice the expected increase of the loss, so that layers can be compared;
            others are brought to that unit by `loss_per_error`.
        iterates: whether it has no closed form, and a choice of optimizers.
        labels: whose labels its statistics are by unless said otherwise: "data", as the papers' are, or "model" (see
            `compute_statistics`).
        sequential: whether factors are found behind each other unless said otherwise, where the samples are given and
            all layers can (see `CompressionConfig`).
    """

    name: str
    formula: str
    source: str
    needs: tuple[str, ...] = ()
    allocation: str = "uniform"
    in_loss_units: bool = False
    iterates: bool = False
    labels: str = "data"
    sequential: bool = False

    @property
    def can_be_sequential(self) -> bool:
        """Whether factors can be found behind a compressed prefix: where inputs count by their moment."""
        return "activation_mean" in self.needs and not self.iterates

    def needs_for(self, losses: bool) -> tuple[str, ...]:
        """The statistics that the method needs.

        Args:
            losses: whether also those that say what loss an error means.
        """
        unit = () if self.in_loss_units or not losses else LOSS_UNIT
        return tuple(dict.fromkeys([*self.needs, *unit]))

    @property
    def objective(self) -> "Callable[[Means], Objective]":
        """From a layer's statistics by kind to its objective."""
        from hf_lowrank.solvers.methods import OBJECTIVES  # here: tensors take time to import

        return OBJECTIVES[self.name]


_INPUTS = ("activation_moment", "activation_mean", "active_tokens")

METHODS = {
    method.name: method
    for method in (
        Method("svd", "‖Δ‖²", "Eckart & Young (1936)"),
        Method("fwsvd", "‖Δ diag(√f)‖², f = Σ_out F", "FWSVD, Hsu et al. (2022)", ("fisher_rows",)),
        Method(
            "fwsvd2",
            "‖diag(√r) Δ diag(√f)‖², r fᵀ ≈ F",
            "the rank-1 Fisher, in closed form",
            ("fisher",),
            in_loss_units=True,
        ),
        Method("tfwsvd", "Σ F ∘ Δ²", "TFWSVD, Hua et al. (2022)", ("fisher",), in_loss_units=True, iterates=True),
        Method("asvd", "‖Δ diag(√a)‖², a = mean |x|", "ASVD, Yuan et al. (2023), α = 1/2", ("activation_magnitude",)),
        Method("whiten", "E‖Δ x‖²", "DRONE, Chen et al. (2021); SVD-LLM, Wang et al. (2024)", _INPUTS),
        Method(
            "whiten-diag",
            "E‖diag(√γ) Δ x‖², γ = E g²",
            "whitening × output gradients",
            (*_INPUTS, "gradient_moment"),
            "greedy",
            in_loss_units=True,
        ),
        Method(
            "kfac",
            "E[tr Δᵀ G Δ A], G = E g gᵀ, A = E x xᵀ",
            "K-FAC, Martens & Grosse (2015)",
            (*_INPUTS, "gradient_moment"),
            "greedy",
            in_loss_units=True,
            labels="model",
            sequential=True,
        ),
        Method(
            "gfwsvd",
            "tr Δᵀ B Δ A, A ⊗ B the nearest Kronecker product to E[vec G_n vec G_nᵀ]",
            "GFWSVD, Chekalina et al. (2025)",
            ("kronecker_in", "kronecker_out", "fisher_sketch"),
            "greedy",
        ),
        Method(
            "ekfac",
            "Σ F' ∘ (Q_Gᵀ Δ Q_A)², F' = E (Q_Gᵀ G_n Q_A)²",
            "EK-FAC, George et al. (2018)",
            ("activation_moment", "gradient_moment", "fisher_in_eigenbasis"),
            "greedy",
            in_loss_units=True,
            iterates=True,
        ),
    )
}

# What is compared unless told otherwise: the papers' methods and the default.
COMPARED = ("svd", "fwsvd", "tfwsvd", "kfac")

# By a test the keys of `OPTIMIZERS`, which holds the functions: for methods that iterate.
OPTIMIZER_NAMES = ("alternating", "em", "em-nesterov", "em-anderson", "sgd", "adam", "adam-sgd", "lbfgs", "als")

# By a test the keys of `GAUGES`, the first one the default.
GAUGE_NAMES = ("flat", "balanced")
DEFAULT_GAUGE = GAUGE_NAMES[0]


def check_optimizer(name: str) -> None:
    """Raise for an optimizer that is not registered.

    Raises:
        LowRankError: the message lists the names.
    """
    registry = sys.modules.get("hf_lowrank.solvers.optimizers.registry")  # with one's own, who has imported it
    known = OPTIMIZER_NAMES if registry is None else tuple(registry.OPTIMIZERS)
    if name not in known:
        raise LowRankError(f"unknown optimizer {name!r}; the optimizers are {', '.join(known)}")


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        LowRankError: there is none; the message lists the names.
    """
    if name not in METHODS:
        raise LowRankError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]
