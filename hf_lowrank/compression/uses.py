"""A model and its targets → what an allocation is told of them: shapes, present ranks, and how often each is used.

Uses are counted in a forward pass over one fixed input.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.allocation import Budget, Layer
from hf_lowrank.allocation.budget import PER_USE
from hf_lowrank.allocation.costs import ONCE, Uses
from hf_lowrank.errors import LowRankError
from hf_lowrank.model.probe import fixed_inputs
from hf_lowrank.model.targets import Target, tied_targets


def layers_for(budget: Budget, model: PreTrainedModel, targets: Mapping[str, Target]) -> dict[str, Layer]:
    """What an allocation is told of the targets: with their uses, where the budget asks for them.

    Raises:
        LowRankError: as `count_uses`; or the budget cannot count such layers.
    """
    uses: Mapping[str, Uses] = {}
    if budget.kind in PER_USE:
        _refuse_uncounted(targets, budget)
        uses = count_uses(model, targets)
    return {name: as_layer(target, uses.get(name, ONCE)) for name, target in targets.items()}


def as_layer(target: Target, uses: Uses = ONCE) -> Layer:
    """A target without its module."""
    return Layer(target.shape, target.rank, target.form, uses)


def _refuse_uncounted(targets: Mapping[str, Target], budget: Budget) -> None:
    """Raise where what a forward pass does is not the same for every token."""
    convolutions = [name for name, target in targets.items() if target.kind == "convolution"]
    if convolutions:
        raise LowRankError(
            f"{convolutions[0]}: what a convolution costs depends on the size of its input, which the budget "
            f"{budget.kind} does not know: give keep, keep_model, params or rank_ratio, or exclude the convolutions"
        )
    experts = [name for name, target in targets.items() if target.kind == "expert"]
    if experts:  # arithmetic and time are of one token through every layer, and it visits few of the experts
        raise LowRankError(
            f"a {budget.kind} budget counts every layer for every token, and {experts[0]} sees only those routed to "
            "it: give a budget of parameters (rank_ratio, keep, keep_model, params), or exclude the experts"
        )


def count_uses(model: PreTrainedModel, targets: Mapping[str, Target]) -> dict[str, Uses]:
    """Every call counts: a block that is shared as often as it runs, an embedding with the layers tied to it.

    Raises:
        LowRankError: the model cannot be run on a fixed input, or does not reach a target.
    """
    calls: dict[str, list[bool]] = {name: [] for name in targets}
    with ExitStack() as hooks:
        for name, target in targets.items():
            users = {user.module: user for user in (target, *tied_targets(model, target))}
            for module, user in users.items():
                note = _noting(calls[name], lookup=user.kind == "embedding")
                hooks.callback(module.register_forward_hook(note).remove)
        _run(model)
    missed = next((name for name, seen in calls.items() if not seen), None)
    if missed is not None:
        raise LowRankError(
            f"{missed} is not reached by a forward pass over a fixed input, so that its operations and its time are "
            "not known: exclude it, or give a budget of parameters (rank_ratio, keep, keep_model, params)"
        )
    return {name: Uses(products=seen.count(False), lookups=seen.count(True)) for name, seen in calls.items()}


def _noting(seen: list[bool], lookup: bool) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        seen.append(lookup)

    return hook


@torch.no_grad()
def _run(model: PreTrainedModel) -> None:
    """One forward pass in evaluation mode; the model is left in the mode it had."""
    training = model.training
    try:
        dtype, device = model.dtype, model.device
        inputs = {key: value.to(device) for key, value in fixed_inputs(model).items()}
        model.eval()(**{key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()})
    except Exception as error:  # models with other inputs raise what they like
        raise LowRankError(
            f"how often {type(model).__name__} uses its layers cannot be counted, as it does not run on a fixed input "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}): give a budget of "
            "parameters (rank_ratio, keep, keep_model, params)"
        ) from error
    finally:
        model.train(training)
