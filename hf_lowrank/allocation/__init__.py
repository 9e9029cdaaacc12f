"""Shapes, costs and losses of layers + budget → {name: rank}, None where one stays as it is. Knows no model."""

from typing import TYPE_CHECKING

from hf_lowrank.jobs.imports import lazily

if TYPE_CHECKING:
    from hf_lowrank.allocation.budget import BUDGETS, AlreadySmaller, Budget, ImpossibleBudget, parse_count
    from hf_lowrank.allocation.choices import Ranks
    from hf_lowrank.allocation.costs import Layer, minimal_parameters, parameters, parameters_at, saves_parameters
    from hf_lowrank.allocation.ranks import Profile, Spectrum, allocate, check_budget, ranks_below, uniform_ranks
    from hf_lowrank.allocation.rules import ALLOCATIONS, get_allocation
    from hf_lowrank.allocation.spread import Spread

__all__ = [
    "ALLOCATIONS",
    "BUDGETS",
    "AlreadySmaller",
    "Budget",
    "ImpossibleBudget",
    "Layer",
    "Profile",
    "Ranks",
    "Spectrum",
    "Spread",
    "allocate",
    "check_budget",
    "get_allocation",
    "minimal_parameters",
    "parameters",
    "parameters_at",
    "parse_count",
    "ranks_below",
    "saves_parameters",
    "uniform_ranks",
]

__getattr__ = lazily(
    __name__,
    {
        "ALLOCATIONS": "rules",
        "BUDGETS": "budget",
        "AlreadySmaller": "budget",
        "Budget": "budget",
        "ImpossibleBudget": "budget",
        "Layer": "costs",
        "Profile": "ranks",
        "Ranks": "choices",
        "Spectrum": "ranks",
        "Spread": "spread",
        "allocate": "ranks",
        "check_budget": "ranks",
        "get_allocation": "rules",
        "minimal_parameters": "costs",
        "parameters": "costs",
        "parameters_at": "costs",
        "parse_count": "budget",
        "ranks_below": "ranks",
        "saves_parameters": "costs",
        "uniform_ranks": "ranks",
    },
)
