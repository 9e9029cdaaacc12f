"""Which linear layers of a model to factorize: model + name patterns → {name: module}."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import LowRankError
from hf_lowrank.layers_lowrank import dense_weight
from hf_lowrank.modeling_lowrank import tied_layers
from hf_lowrank.weights import whole_weight

PLAIN_SUBCLASSES = ("FalconLinear",)  # of nn.Linear, in transformers: they only round in another order

PATTERN_SYNTAX = (
    "patterns are shell globs over the whole dotted name ('*.attention.*') or its last parts ('query', 'mlp.fc1')"
)


def find_targets(
    model: PreTrainedModel, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The layers to factorize, by name, a shared layer once, under its first name.

    Without `include` these are the linears inside the transformer blocks; with it, every linear and embedding of the
    model that a pattern names (a pooler, a head or an embedding only this way). An output layer tied to an embedding
    goes with it; other layers whose weight is tied, and subclasses that modelling code made its own, are never targets.

    Raises:
        LowRankError: a pattern names no such layer, or nothing is left.
    """
    candidates = factorizable_linears(model)
    if include:
        candidates |= factorizable_embeddings(model)
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    if include:
        kept = {name for pattern in include for name in _matches(pattern, candidates)}
    else:
        kept = {name for name in candidates if name.startswith(blocks)}
    dropped = {name for pattern in exclude or () for name in _matches(pattern, candidates)}
    targets = {name: module for name, module in candidates.items() if name in kept - dropped}
    if not targets:
        raise LowRankError(
            f"{type(model).__name__} has no linear layer to factorize: {len(candidates)} can be, "
            f"{len(kept)} were chosen, {len(dropped)} excluded"
        )
    return targets


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, `Conv1D` included."""
    out_features, in_features = dense_weight(module).shape
    return out_features, in_features


def check_weights(targets: dict[str, nn.Module]) -> None:
    """Raise where a weight is not finite.

    Raises:
        LowRankError: the module is named, with the number of its bad weights.
    """
    for name, module in targets.items():
        weight = whole_weight(module)
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise LowRankError(f"{name}: {bad} of its {weight.numel()} weights are not finite; the model is damaged")


def factorizable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every `nn.Linear` and `Conv1D` of the model whose weight is its own, by name."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    tied = _tied_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module)
        and module is not model.get_output_embeddings()
        and owners[id(module.weight)] == 1
        and f"{name}.weight" not in tied
    }


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer and nothing more: a subclass may use its weight in its own way."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ in PLAIN_SUBCLASSES


def factorizable_embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every embedding of the model by name, those tied to an earlier one apart: they go with it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Embedding
        and module.max_norm is None
        and not module.sparse
        and not module.scale_grad_by_freq
        and f"{name}.weight" not in tied
        and all(type(model.get_submodule(other)) in (nn.Embedding, nn.Linear) for other in tied_layers(model, name))
    }


def _tied_names(model: PreTrainedModel) -> set[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return set(tied) | set(tied.values())


def _matches(pattern: str, names: dict[str, nn.Module]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
    if not found:
        some = ", ".join(list(names)[:3])
        embeddings = sum(isinstance(module, nn.Embedding) for module in names.values())
        kinds = f"{len(names) - embeddings} linear layers" + (f" and {embeddings} embeddings" if embeddings else "")
        raise LowRankError(f"the pattern {pattern!r} matches none of the {kinds} ({some}, …); {PATTERN_SYNTAX}")
    return found
