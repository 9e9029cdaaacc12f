"""Which layers of a model to factorize: model + name patterns → {name: Target}."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.checks import check_model
from hf_lowrank.model.layer_names import is_expert_layer
from hf_lowrank.model.weights import is_sharded, whole_weight
from hf_lowrank.nn.editing_lowrank import replace_by_identity, tied_layers
from hf_lowrank.nn.experts_lowrank import UnstackedExperts, unstacked_names
from hf_lowrank.nn.layers_lowrank import (
    CONVOLUTIONS,
    LowRankLayer,
    LowRankLinear,
    dense_weight,
    is_convolution,
    is_embedding,
)

PLAIN_SUBCLASSES = ("FalconLinear",)  # of nn.Linear, in transformers: they only round in another order

PATTERN_SYNTAX = (
    "patterns are shell globs over the whole dotted name ('*.attention.*') or its last parts ('query', 'mlp.fc1')"
)


@dataclass(frozen=True, eq=False)
class Target:
    """A layer to factorize, dense or factorized already.

    Args:
        name: of the module in the model, or the one that it gets when stacked experts are unstacked.
        module: the layer. Of stacked experts it is a view of their slice, which is no module of the model as yet.
        shape: (out, in) of its weight, as `weight_shape` gives it.
        kind: "expert" is a linear layer of one expert among several.
        owner: the stacked experts that it is a slice of; None for a module of the model.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    kind: Literal["linear", "embedding", "convolution", "expert"]
    owner: nn.Module | None = None

    @classmethod
    def of(cls, name: str, module: nn.Module, owner: nn.Module | None = None) -> "Target":
        """The target that a layer is."""
        shape = weight_shape(module)
        if is_embedding(module):
            return cls(name, module, shape, "embedding")
        if is_convolution(module):
            return cls(name, module, shape, "convolution")
        return cls(name, module, shape, "expert" if is_expert_layer(name) else "linear", owner)

    @property
    def rank(self) -> int | None:
        """The rank of a layer that is factorized already, None of a dense one."""
        return self.module.rank if isinstance(self.module, LowRankLayer) else None

    @property
    def form(self) -> str:
        """The form that its factors have, if it is factorized already (see `FORMS`)."""
        return self.module.form if isinstance(self.module, LowRankLinear) else LowRankLinear.form


def find_targets(
    model: PreTrainedModel, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, Target]:
    """The layers to factorize, by name, a shared layer once, under its first name.

    Without `include` these are the linears inside the transformer blocks, and all layers that are factorized already;
    with it, every linear, embedding and convolution of the model that a pattern names (a pooler or a head too only this
    way). An output layer tied to an embedding goes with it. Never targets are other layers whose weight is tied,
    subclasses that modelling code made its own, convolutions that are transposed, grouped (depthwise) or have a weight
    norm, and factors on their own.

    Every projection of an expert whose weights are stacked is a linear layer, such as `experts.gate_up_proj.3`: a view
    of its slice, which is no module of the model as yet (see `unstacked`).

    Args:
        model: a transformers model, which is left as it is.
        include: name patterns, shell globs over the dotted name or its last parts; None for the default above.
        exclude: name patterns of layers to leave out.

    Raises:
        LowRankError: a pattern names no such layer, nothing is left, or stacked experts are offloaded or sharded; or as
            `check_model`.
    """
    check_model(model)
    stacked, factorized = _stacked_layers(model), factorized_layers(model)
    candidates = _in_order(model, factorizable_linears(model) | factorized) | stacked
    if include:
        candidates |= _chosen_by_name(model)
    if include and not candidates:
        raise LowRankError(f"{type(model).__name__} has no linear layer to factorize")
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    if include:
        kept = {name for pattern in include for name in _matches(pattern, candidates)}
    else:
        kept = {name for name in candidates if name in factorized or name.startswith(blocks)}
    dropped = {name for pattern in exclude or () for name in _matches(pattern, candidates)}
    chosen = {name: module for name, module in candidates.items() if name in kept - dropped}
    if not chosen:
        nameable = _counted(candidates if include else candidates | _chosen_by_name(model))
        raise LowRankError(
            f"{type(model).__name__} has no linear layer to factorize{'' if include else ' inside of a block'}: "
            f"{len(kept)} were chosen, {len(dropped)} excluded; include chooses by name, from {nameable}"
        )
    chosen |= _views({name: stacked[name] for name in chosen if name in stacked})
    return {name: Target.of(name, module, stacked.get(name)) for name, module in chosen.items()}


def tied_targets(model: nn.Module, embedding: Target) -> list[Target]:
    """The layers whose weight is tied to that of an embedding, none for another target."""
    names = tied_layers(model, embedding.name) if embedding.kind == "embedding" else ()
    return [Target.of(name, model.get_submodule(name)) for name in names]


@contextmanager
def unstacked(model: nn.Module, targets: Mapping[str, Target]) -> Iterator[None]:
    """Within the block, stacked experts are layers of their own where some are targets, which then are in the model."""
    made: dict[nn.Module, UnstackedExperts] = {}
    for target in targets.values():
        if target.owner is not None:
            if target.owner not in made:
                made[target.owner] = UnstackedExperts(target.owner)
            projection, number = target.name.split(".")[-2:]
            getattr(made[target.owner], projection)[int(number)] = target.module
    try:
        replace_by_identity(model, made)
        yield
    finally:
        replace_by_identity(model, {new: experts for experts, new in made.items()})


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, `Conv1D` included; of a convolution (out, in · kernel sizes)."""
    if isinstance(module, LowRankLayer):
        return module.out_features, module.in_features
    out_features, in_features = dense_weight(module).shape
    return out_features, in_features


def dense_parameters(model: PreTrainedModel) -> int:
    """The parameters of a model with every factorized layer dense, as it was before it was compressed."""
    layers = factorized_layers(model).values()
    return model.num_parameters() + sum(prod(weight_shape(layer)) - layer.num_parameters() for layer in layers)


def factorized_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The layers that are factorized already, by name, those tied to another one apart."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    return {name: layer for name, layer in layers.items() if f"{name}.up.weight" not in ties}


def check_weights(targets: Mapping[str, Target]) -> None:
    """Raise where a weight is not there, or not finite.

    Raises:
        LowRankError: the module is named, with the number of its bad weights.
    """
    for name, target in targets.items():
        weight = whole_weight(target.module)
        if weight.is_meta:
            raise LowRankError(f"{name} is on the meta device, without a weight: load the model by from_pretrained")
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise LowRankError(f"{name}: {bad} of its {weight.numel()} weights are not finite; the model is damaged")


def factorizable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every `nn.Linear` and `Conv1D` of the model whose weight is its own, by name."""
    return _with_own_weight(model, _is_linear)


def _chosen_by_name(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What is factorized only where a pattern names it."""
    return factorizable_embeddings(model) | factorizable_convolutions(model)


def factorizable_convolutions(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every plain, ungrouped `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` of the model whose weight is its own, by name."""
    # What modelling code keeps in a plain list and calls from there (MaskFormer) would go on being called.
    plain_lists = [value for module in model.modules() for value in vars(module).values() if isinstance(value, list)]
    listed = {id(item) for value in plain_lists for item in value}
    return _with_own_weight(model, lambda module: _is_convolution(module) and id(module) not in listed)


def _with_own_weight(model: PreTrainedModel, chosen: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    tied = _tied_names(model)
    return {
        name: module
        for name, module in _not_factors(model)
        if chosen(module)
        and module is not model.get_output_embeddings()
        and owners.get(id(module.weight)) == 1  # None where a weight norm computes it
        and f"{name}.weight" not in tied
    }


def _not_factors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, apart from layers that are factorized and what is inside them."""
    layers = [module for module in model.modules() if isinstance(module, LowRankLayer)]
    inside = {id(part) for layer in layers for part in layer.modules()}
    return ((name, module) for name, module in model.named_modules() if id(module) not in inside)


def _in_order(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: layers[name] for name, _ in model.named_modules() if name in layers}


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer and nothing more: a subclass may use its weight in its own way."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ in PLAIN_SUBCLASSES


def _is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution over all channels and nothing more."""
    return isinstance(module, CONVOLUTIONS) and type(module) in CONVOLUTIONS and module.groups == 1


def factorizable_embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every embedding of the model by name, those tied to an earlier one apart: they go with it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: module
        for name, module in _not_factors(model)
        if type(module) is nn.Embedding
        and module.max_norm is None
        and not module.sparse
        and not module.scale_grad_by_freq
        and f"{name}.weight" not in tied
        and all(type(model.get_submodule(other)) in (nn.Embedding, nn.Linear) for other in tied_layers(model, name))
    }


def _stacked_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """{name of a layer of stacked experts once they are unstacked: those experts}, shared ones once."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    tied = _tied_names(model)
    return {
        name: experts
        for name, experts in unstacked_names(model, remove_duplicate=True).items()
        if name.rpartition(".")[0] not in tied and all(uses[id(p)] == 1 for p in experts.parameters())
    }


def _views(stacked: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that names within stacked experts stand for, without changing those.

    Raises:
        LowRankError: the experts' weights are offloaded, or sharded over processes.
    """
    made: dict[nn.Module, UnstackedExperts] = {}
    views = {}
    for name, experts in stacked.items():
        prefix, projection, number = name.rsplit(".", 2)
        if has_offloaded_params(experts) or is_sharded(experts):
            where = "sharded by FSDP2" if is_sharded(experts) else "offloaded"
            raise LowRankError(
                f"the experts {prefix} are {where}, and stacked experts must be whole in memory: load the model "
                "without, or exclude them ('*.experts.*')"
            )
        if experts not in made:
            made[experts] = UnstackedExperts(experts)
        views[name] = getattr(made[experts], projection)[int(number)]
    return views


def _tied_names(model: PreTrainedModel) -> set[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return set(tied) | set(tied.values())


def _matches(pattern: str, names: dict[str, nn.Module]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
    if not found:
        some = ", ".join(list(names)[:3])
        raise LowRankError(
            f"the pattern {pattern!r} matches none of the {_counted(names)} ({some}, …); {PATTERN_SYNTAX}"
        )
    return found


def _counted(layers: dict[str, nn.Module]) -> str:
    """How many layers there are of each kind, in words.

    >>> _counted({"a": nn.Linear(1, 1), "b": nn.Conv1d(1, 1, 1)})
    '1 linear layer, 1 convolution'
    """
    embeddings = sum(is_embedding(module) for module in layers.values())
    convolutions = sum(is_convolution(module) for module in layers.values())
    counts = {"linear layer": len(layers) - embeddings - convolutions}
    counts |= {"embedding": embeddings, "convolution": convolutions}
    return ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in counts.items() if n) or "0 linear layers"
