"""A decoder and the second moments of its MLPs' inner channels → the same class of model, its MLPs narrower."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.checks import quantizer_of, refuse_adapter
from hf_lowrank.model.weightless import weightless
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
        LowRankError: as `gated_mlps`; the statistics lack them; a width out of range.
    """
    found = gated_mlps(model)
    solved = {name: nystrom(statistics.mean("activation_moment", f"{name}.down_proj"), width) for name in found}
    for name, module in found.items():
        _narrow_mlp(module, *solved[name])
    model.config.get_text_config().intermediate_size = width
    return model


def gated_mlps(model: PreTrainedModel) -> dict[str, Any]:
    """The MLPs of gate_proj, up_proj and down_proj by name, if they can be made narrower together.

    Raises:
        LowRankError: there are none, of different widths, of another than the config's, or with a weight in common; a
            layer is factorized or quantized; there is an adapter.
    """
    refuse_adapter(model)
    found = {name: module for name, module in model.named_modules() if all(hasattr(module, part) for part in PARTS)}
    layers = {f"{name}.{part}": getattr(module, part) for name, module in found.items() for part in PARTS}
    other = next((name for name, layer in layers.items() if type(layer) is not nn.Linear), None)
    if other is not None or quantizer_of(model) is not None:
        changed = f"{other} is a {type(layers[other]).__name__}" if other is not None else "its weights are quantized"
        raise LowRankError(
            f"this {type(model).__name__} cannot be made narrower, as {changed}: narrow the dense model that it was "
            "made from, and factorize or quantize what becomes of it"
        )
    widths = {module.down_proj.in_features for module in found.values()}
    shared = len({id(layer.weight) for layer in layers.values()}) < len(layers)
    if len(widths) != 1 or shared:
        several = "MLPs that share weights" if shared else "MLPs of different widths"
        reason = several if found else "no MLPs of gate_proj, up_proj and down_proj"
        raise LowRankError(f"a {type(model).__name__} with {reason} cannot be made narrower; factorize it instead")
    if _as_wide_as_the_config(model) != set(layers):
        raise LowRankError(
            f"a {type(model).__name__} whose MLPs are not all of the config's intermediate_size, such as shared "
            "experts, or a list of sizes, cannot be made narrower; factorize it instead"
        )
    return found


def _as_wide_as_the_config(model: PreTrainedModel) -> set[str]:
    """The layers that have another shape where the config has another `intermediate_size`."""
    config = copy.deepcopy(model.config)
    if not isinstance(getattr(text := config.get_text_config(), "intermediate_size", None), int):
        return set()
    text.intermediate_size = 1
    shapes = {name: parameter.shape for name, parameter in weightless(type(model), config).named_parameters()}
    changed = [name for name, parameter in model.named_parameters() if parameter.shape != shapes.get(name)]
    return {name.rpartition(".")[0] for name in changed}


def width_for(model: PreTrainedModel, keep: float, align: int = 1) -> int:
    """The inner channels of an MLP that are at most a share of those it has: a multiple of `align`, or all.

    Args:
        model: as in `narrow`.
        keep: the share, of the channels and so of the weights of these MLPs.
        align: engines and GPUs like multiples of 64 or more.

    Raises:
        LowRankError: as `gated_mlps`; the share is none, or leaves nothing.
    """
    if not 0 < keep <= 1:
        raise LowRankError(f"keep is a share of the MLPs' channels, in (0, 1], such as 0.8; it is {keep}")
    width = next(iter(gated_mlps(model).values())).down_proj.in_features
    kept = width if keep == 1 else int(keep * width + 1e-6) // align * align
    if not kept:
        raise LowRankError(f"{keep:.0%} of {width} channels are fewer than align, {align}: keep more, or align by less")
    return kept


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
