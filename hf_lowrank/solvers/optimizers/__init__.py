"""Ways to minimise Σ importance ∘ (weight − up @ down)², all with one signature, one start and one stopping rule.

`alternating` is the default. The others are the published ways to the same factors, kept for comparison
(`python -m benchmarks convergence`) and for those who want to reproduce them.
"""

# Importing a module registers its optimizers.
from hf_lowrank.solvers.optimizers import alternating, expectation, first_order, least_squares
from hf_lowrank.solvers.optimizers.registry import OPTIMIZERS, Optimizer, Solution, Trace, get_optimizer

__all__ = [
    "OPTIMIZERS",
    "Optimizer",
    "Solution",
    "Trace",
    "alternating",
    "expectation",
    "first_order",
    "get_optimizer",
    "least_squares",
]
