"""model + data → statistics of every targeted layer: what the loss says about its weights and inputs."""

from typing import TYPE_CHECKING

from hf_lowrank.jobs.imports import lazily

if TYPE_CHECKING:
    from hf_lowrank.statistics.collect import compute_fisher, compute_statistics
    from hf_lowrank.statistics.container import Statistics
    from hf_lowrank.statistics.kinds import KINDS

__all__ = ["KINDS", "Statistics", "compute_fisher", "compute_statistics"]

__getattr__ = lazily(
    __name__,
    {
        "KINDS": "kinds",
        "Statistics": "container",
        "compute_fisher": "collect",
        "compute_statistics": "collect",
    },
)
