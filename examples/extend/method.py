"""A method of one's own: ASVD with α = 1, where an input counts by the square of its mean magnitude."""

from hf_lowrank.solvers.methods import Means, Objective, method
from hf_lowrank.solvers.scaled import DiagonalScaling, Scaled, Scaling


@method("asvd1", "‖Δ diag(a)‖², a = mean |x|", "ASVD, Yuan et al. (2023), α = 1", needs=("activation_magnitude",))
def asvd1(statistics: Means) -> Objective:
    """An input counts by the square of its mean magnitude [in]."""
    return Scaled(Scaling(), DiagonalScaling(statistics["activation_magnitude"].square()))
