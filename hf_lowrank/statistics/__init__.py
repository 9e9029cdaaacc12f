"""model + data → statistics of every targeted layer: what the loss says about its weights and inputs."""

from hf_lowrank.statistics.collect import compute_fisher, compute_statistics
from hf_lowrank.statistics.container import Statistics
from hf_lowrank.statistics.kinds import KINDS

__all__ = ["KINDS", "Statistics", "compute_fisher", "compute_statistics"]
