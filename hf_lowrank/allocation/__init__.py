"""targets + budget → {module name: rank}, None where a layer stays dense."""

from hf_lowrank.allocation.allocate import Profile, Spread, allocate, check_budget, uniform_ranks
from hf_lowrank.allocation.budget import BUDGETS, Budget, ImpossibleBudget, parse_count
from hf_lowrank.allocation.choices import Ranks
from hf_lowrank.allocation.costs import minimal_parameters, parameters, parameters_at, saves_parameters
from hf_lowrank.allocation.rules import ALLOCATIONS, get_allocation

__all__ = [
    "ALLOCATIONS",
    "BUDGETS",
    "Budget",
    "ImpossibleBudget",
    "Profile",
    "Ranks",
    "Spread",
    "allocate",
    "check_budget",
    "get_allocation",
    "minimal_parameters",
    "parameters",
    "parameters_at",
    "parse_count",
    "saves_parameters",
    "uniform_ranks",
]
