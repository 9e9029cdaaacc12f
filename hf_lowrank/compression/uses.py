"""A model and its targets → how often a token passes through each, counted in a forward pass over one fixed input."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.allocation import Budget
from hf_lowrank.allocation.budget import PER_USE
from hf_lowrank.allocation.costs import Uses
from hf_lowrank.allocation.ranks import refuse_uncounted
from hf_lowrank.errors import LowRankError
from hf_lowrank.model.probe import fixed_inputs
from hf_lowrank.nn.editing_lowrank import tied_layers
from hf_lowrank.nn.layers_lowrank import is_embedding


def uses_for(budget: Budget, model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> dict[str, Uses] | None:
    """The uses of the targets, where the budget asks for them.

    Raises:
        LowRankError: as `count_uses`; or the budget cannot count such layers.
    """
    refuse_uncounted(dict(targets), budget)
    return count_uses(model, targets) if budget.kind in PER_USE else None


def count_uses(model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> dict[str, Uses]:
    """Every call counts: a block that is shared as often as it runs, an embedding with the layers tied to it.

    Raises:
        LowRankError: the model cannot be run on a fixed input, or does not reach a target.
    """
    calls: dict[str, list[bool]] = {name: [] for name in targets}
    with ExitStack() as hooks:
        for name, module in targets.items():
            tied = tied_layers(model, name) if is_embedding(module) else []
            for used in dict.fromkeys((module, *(model.get_submodule(other) for other in tied))):
                hooks.callback(used.register_forward_hook(_noting(calls[name], is_embedding(used))).remove)
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
