"""weight + statistics + rank → factors. Pure tensors: nothing here knows a model.

One idea: a method is an importance, that is a weighted squared error `objective.error(delta)` of the change
`delta = W − up @ down`, built from the statistics of one layer (`methods.py`; `family.py` says what each is). The
importance is either a scaling of both sides of W, whose best factors are a truncated SVD (`scaled.py`), or a weight for
every element, whose best factors are found by iteration (`elementwise.py`). Factors are only determined up to a basis
of their inner channels, which `gauge.py` chooses.
"""

from typing import TYPE_CHECKING

from hf_lowrank.jobs.imports import lazily

if TYPE_CHECKING:
    from hf_lowrank.solvers.elementwise import with_optimizer
    from hf_lowrank.solvers.factors import Factors
    from hf_lowrank.solvers.family import METHODS, Method, get_method
    from hf_lowrank.solvers.gauge import GAUGES
    from hf_lowrank.solvers.methods import Objective, loss_per_error
    from hf_lowrank.solvers.optimizers import OPTIMIZERS, get_optimizer

__all__ = [
    "GAUGES",
    "METHODS",
    "OPTIMIZERS",
    "Factors",
    "Method",
    "Objective",
    "get_method",
    "get_optimizer",
    "loss_per_error",
    "with_optimizer",
]

__getattr__ = lazily(
    __name__,
    {
        "GAUGES": "gauge",
        "METHODS": "family",
        "OPTIMIZERS": "optimizers",
        "Factors": "factors",
        "Method": "family",
        "Objective": "methods",
        "get_method": "family",
        "get_optimizer": "optimizers",
        "loss_per_error": "methods",
        "with_optimizer": "elementwise",
    },
)
