"""Group truncation: each tenth of the singular directions of all layers removed alone → the damage it does.

Hsu et al. (2022), section 3 and figures 1 and 6. If a method orders directions by their importance to the task, the
first group does most damage and the last least.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers import Objective
from hf_lowrank.solvers.elementwise import ElementWise, Rotated
from hf_lowrank.studies.analysis.evaluator import Measurement
from hf_lowrank.studies.analysis.predictor import spearman
from hf_lowrank.studies.analysis.study import Change, Study, relative_error


@dataclass(frozen=True)
class Group:
    """One group of directions removed from every layer. `group` counts from 1, the directions said to matter most.

    `reconstruction_error` is ‖Δ‖ / ‖W‖ over all layers, `importance_share` the group's share of what the method's own
    objective says the directions are worth, layers together.
    """

    group: int
    measured: Measurement
    reconstruction_error: float
    importance_share: float


@dataclass(frozen=True)
class GroupTruncation:
    """A method's groups. `monotonicity` is −Spearman(group, damage): 1 where damage falls steadily, the ideal.

    `monotonicity_loss` is the same of the loss increase. None where all are the same. `concentration` is the share of
    the damage (gains counted as none) that the first third of the groups does. Where it is near 1 the others do no
    damage, so that their order is noise, and a low monotonicity no fault.
    """

    method: str
    groups: tuple[Group, ...]
    monotonicity: float | None
    monotonicity_loss: float | None
    concentration: float | None

    @property
    def ideal(self) -> tuple[float, ...]:
        """The same damages, falling: what a perfect order of the directions would show."""
        return tuple(sorted((group.measured.damage for group in self.groups), reverse=True))


@dataclass(frozen=True)
class Directions:
    """A weight as a sum of rank-1 terms up[:, k] down[k], with `worth` [rank] under the objective, largest first."""

    up: Tensor
    down: Tensor
    worth: Tensor

    def part(self, chosen: slice) -> Tensor:
        """The sum of some terms [out, in]."""
        return self.up[:, chosen] @ self.down[chosen]


def directions(objective: Objective, weight: Tensor) -> Directions:
    """The directions of a weight [out, in] in the order in which a method would keep them.

    Of a closed form these are the singular directions of the scaled weight, scaled back, and their worth its squared
    singular values. With importance of single elements (TFWSVD) the full-rank problem has no directions of its own: any
    basis attains error 0. Taken are those of the two-sided closed form that the solver starts from, ordered by their
    true weighted contribution Σ F ∘ (u_k v_kᵀ)².
    """
    full = min(weight.shape)
    if isinstance(objective, Rotated):
        turned = directions(objective.objective, objective.left.T @ weight.float() @ objective.right)
        return Directions(objective.left @ turned.up, turned.down @ objective.right.T, turned.worth)
    if isinstance(objective, ElementWise):
        factors = objective.two_sided().factorize(weight, full)
        up, down = factors.up.double(), factors.down.double()
        worth = ((up.square().T @ objective.importance.double()) * down.square()).sum(dim=1)
        order = worth.argsort(descending=True)
        return Directions(up[:, order].float(), down[order].float(), worth[order])
    factors = objective.factorize(weight, full)
    return Directions(factors.up.float(), factors.down.float(), objective.spectrum(weight))


def group_slice(rank: int, group: int, groups: int) -> slice:
    """The directions of group `group` (from 0) of `groups` as nearly equal as can be.

    >>> [group_slice(7, g, 3) for g in range(3)]
    [slice(0, 2, None), slice(2, 5, None), slice(5, 7, None)]
    """
    return slice(round(group * rank / groups), round((group + 1) * rank / groups))


def truncate_groups(study: Study, method: str, groups: int = 10) -> GroupTruncation:
    """Remove each group of directions from all layers at once, in place, and measure the model.

    Raises:
        LowRankError: a layer has fewer directions than there are groups.
    """
    for name in study.targets:
        if min(study.weight(name).shape) < groups:
            raise LowRankError(
                f"{name} has {min(study.weight(name).shape)} singular directions, too few for {groups} groups; "
                "pass fewer --groups or --exclude it"
            )
    job = _Job(study, method, groups)
    results = []
    for group in range(groups):
        key = {"study": "groups", "method": method, "groups": groups, "group": group}
        measured, facts = study.measure(key, partial(job.without, group))
        results.append(Group(group + 1, measured, **facts))
    index = [result.group for result in results]
    rho, rho_loss = (
        spearman(index, [getattr(result.measured, what) for result in results])[0]
        for what in ("damage", "loss_increase")
    )
    damages = [max(result.measured.damage, 0.0) for result in results]
    concentration = sum(damages[: max(1, round(groups / 3))]) / sum(damages) if any(damages) else None
    return GroupTruncation(method, tuple(results), _negative(rho), _negative(rho_loss), concentration)


@dataclass
class _Job:
    study: Study
    method: str
    groups: int

    @cached_property
    def directions(self) -> dict[str, Directions]:
        """Of every layer, found once and only if something is left to measure."""
        with torch.no_grad():
            return {
                name: directions(self.study.objective(self.method, name), self.study.weight(name))
                for name in self.study.targets
            }

    @torch.no_grad()
    def without(self, group: int) -> Change:
        chosen = {name: group_slice(len(d.worth), group, self.groups) for name, d in self.directions.items()}
        removed = {name: d.part(chosen[name]) for name, d in self.directions.items()}
        facts = {
            "reconstruction_error": relative_error((part, self.study.weight(name)) for name, part in removed.items()),
            "importance_share": _share(
                [float(d.worth[chosen[name]].sum()) for name, d in self.directions.items()],
                [float(d.worth.sum()) for d in self.directions.values()],
            ),
        }
        return {name: self.study.weight(name) - part for name, part in removed.items()}, facts


def _share(parts: list[float], wholes: list[float]) -> float:
    return float(np.sum(parts) / max(np.sum(wholes), 1e-300))


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
