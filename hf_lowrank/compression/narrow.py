"""A decoder and the second moments of its MLPs' inner channels → the same class of model, its MLPs narrower."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers.nystrom import nystrom
from hf_lowrank.statistics import Statistics

PARTS = ("gate_proj", "up_proj", "down_proj")
NEEDS, LAYERS = ("activation_moment",), ("*.down_proj",)  # what is measured for it, and of which layers


def narrow(model: PreTrainedModel, statistics: Statistics, width: int) -> PreTrainedModel:
    """Keep `width` inner channels of every gated MLP, in place, and let the last layer make up for the others.

    What becomes is no low-rank model but a plain one with a smaller `intermediate_size`, which everything runs at full
    speed. Nothing but the MLPs is changed.

    Args:
        model: a decoder whose MLPs are down(act(gate(x)) · up(x)), all of one width, such as Llama, Mistral and Qwen.
        statistics: with `NEEDS` of `LAYERS`.
        width: inner channels of every MLP.

    Raises:
        LowRankError: no such MLPs, of different widths, or factorized; the statistics lack them; a width out of range.
    """
    found = {name: module for name, module in model.named_modules() if all(hasattr(module, part) for part in PARTS)}
    widths = {module.down_proj.in_features for module in found.values()}
    plain = all(type(getattr(module, part)) is nn.Linear for module in found.values() for part in PARTS)
    if not plain or len(widths) != 1:
        reason = "MLPs of different widths" if plain and found else "no MLPs of plain gate_proj, up_proj and down_proj"
        raise LowRankError(f"a {type(model).__name__} with {reason} cannot be made narrower; factorize it instead")
    solved = {name: nystrom(statistics.mean("activation_moment", f"{name}.down_proj"), width) for name in found}
    for name, module in found.items():
        _narrow_mlp(module, *solved[name])
    model.config.get_text_config().intermediate_size = width
    return model


@torch.no_grad()
def _narrow_mlp(mlp: Any, kept: Tensor, mixed: Tensor) -> None:
    for part in PARTS[:2]:
        old = getattr(mlp, part)
        own = kept.to(old.weight.device)
        setattr(mlp, part, _linear(old, old.weight[own], None if old.bias is None else old.bias[own]))
    down = mlp.down_proj
    weight = down.weight.double() @ mixed.to(down.weight.device)
    mlp.down_proj = _linear(down, weight.to(down.weight.dtype), down.bias)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = len(kept)


def _linear(old: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer in the place of `old`, with its mode."""
    outputs, inputs = weight.shape
    new = nn.Linear(inputs, outputs, bias is not None, device="meta")
    new.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.clone(), requires_grad=old.weight.requires_grad)
    return new.train(old.training)
