"""Putting layers in the place of others in a model, with ties, shared modules and stacked experts kept whole.

This file travels with saved checkpoints as remote code: see modeling_lowrank.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .experts_lowrank import UnstackedExperts, own_memory, projections, restack, unstacked_names
from .layers_lowrank import LowRankEmbedding, LowRankLayer, LowRankTiedHead, with_parameter
from .parents_lowrank import class_by_children

_TIES = ("all_tied_weights_keys", "_tied_weights_keys")  # attributes of a model that an edit may change
_DESCRIPTIONS = ("ranks", "forms")  # and of a low-rank model's config


@contextmanager
def replaced(model: Any, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block other modules are in the place of those named, as by `replace_module`.

    However the block ends, the model then is what it was: the same modules and parameters under the same names, shared,
    tied and stacked as before, and the same description in its config. Nothing is copied.

    Raises:
        ValueError: as `replace_module`.
    """
    children = {m: (type(m), dict(m._modules), dict(m._parameters)) for m in model.modules()}
    ties = {name: vars(model)[name] for name in _TIES if name in vars(model)}  # a class may have them, too
    config = {name: dict(getattr(model.config, name)) for name in _DESCRIPTIONS if is_low_rank(model)}
    try:
        for name, new in replacements.items():
            replace_module(model, name, new)
        yield
    finally:
        for module, (module_class, modules, parameters) in children.items():
            module.__class__ = module_class
            _refill(module._modules, modules)
            _refill(module._parameters, parameters)
        for name in _TIES:
            vars(model).pop(name, None)
        vars(model).update(ties)
        for name, described in config.items():
            setattr(model.config, name, described)


def _refill(content: dict[str, Any], own: Mapping[str, Any]) -> None:
    content.clear()
    content.update(own)


def replace_module(model: Any, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module called `name`, under every name it is reached by (a shared module stays shared).

    With an embedding, the layers whose weight is tied to its weight are replaced, and tied to its factors, or to the
    weight of another nn.Embedding. Experts of which it is a layer are unstacked first (see `unstack_experts`).

    `config.ranks` and `config.forms` of a low-rank model are kept up to date.

    Raises:
        ValueError: there is no such module, or its weight is tied to another one (the tie would be lost).
    """
    if submodule(model, name) is None:
        unstack_experts(model, [name])
    if submodule(model, name) is not None and _replace_expert_layer(model, name, new):
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise ValueError(f"{type(model).__name__} has no module called {name!r}")
    if isinstance(new, LowRankEmbedding):
        replace_embedding(model, name, new)
    elif isinstance(new, nn.Embedding):
        _replace_dense_embedding(model, name, new)
    else:
        refuse_tied(model, name)
        replace_by_identity(model, {modules[name]: new})
    if is_low_rank(model):
        model.describe_layers()


def _replace_expert_layer(model: Any, name: str, new: nn.Module) -> bool:
    """Replace a layer of unstacked experts, if it is one, without a walk through the model: it may have thousands."""
    prefix, *layer = name.rsplit(".", 2)
    experts = submodule(model, prefix)
    if not isinstance(experts, UnstackedExperts) or len(layer) < 2 or layer[0] not in projections(experts):
        return False
    getattr(experts, layer[0])[int(layer[1])] = new
    if is_low_rank(model):
        model.describe_layer(name, new)
    return True


def refuse_tied(model: nn.Module, name: str) -> None:
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for one, other in ties.items():
        if f"{name}.weight" in (one, other):
            raise ValueError(f"{name} cannot be replaced: its weight is tied ({one} is {other})")


def tied_layers(model: nn.Module, name: str) -> list[str]:
    """The names of other layers whose weight is tied to that of the embedding called `name`.

    Raises:
        ValueError: the embedding is itself tied to another, which is to be replaced in its place.
    """
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    embedding, own = model.get_submodule(name), _weights_of(name)
    if (source := next((ties[key] for key in own if key in ties), None)) is not None:
        raise ValueError(f"{name} cannot be replaced: its weight is tied to {source}, replace that one")
    tied = dict.fromkeys(_layer_of(model, key) for key, other in ties.items() if other in own)
    return [other for other in tied if model.get_submodule(other) is not embedding]


def _weights_of(name: str) -> tuple[str, ...]:
    """The names that the weight of an embedding has, dense or factorized."""
    return tuple(f"{name}.{weight}" for weight in ("weight", "up.weight", "down.weight"))


def _layer_of(model: nn.Module, key: str) -> str:
    """The layer whose weight, or a factor of it, has this name."""
    name = key.rpartition(".")[0]
    around = name.rpartition(".")[0]
    return around if isinstance(submodule(model, around), LowRankLayer) else name


def replace_embedding(model: Any, name: str, new: LowRankEmbedding) -> None:
    tied = tied_layers(model, name)
    replacements: dict[nn.Module, nn.Module] = {model.get_submodule(name): new}
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    for other in tied:
        module = model.get_submodule(other)
        if type(module) in (nn.Embedding, LowRankEmbedding):
            replacements[module] = LowRankEmbedding.like(module, new.rank)
        elif type(module) in (nn.Linear, LowRankTiedHead):
            replacements[module] = LowRankTiedHead.like(module, new.rank)
        else:
            raise ValueError(f"{name} cannot be replaced: its weight is tied to a {type(module).__name__}, {other}")
    replace_by_identity(model, replacements)
    for key in [key for key, source in ties.items() if source in _weights_of(name)]:
        del ties[key]
    for other in tied:
        is_head = isinstance(model.get_submodule(other), LowRankTiedHead)
        for factor, same in (("up", "down"), ("down", "up")) if is_head else (("up", "up"), ("down", "down")):
            ties[f"{other}.{factor}.weight"] = f"{name}.{same}.weight"
        if (bias := ties.pop(f"{other}.bias", None)) is not None:
            ties[f"{other}.up.bias"] = bias
    if tied:
        model.all_tied_weights_keys = ties
        model._tied_weights_keys = dict(ties)  # of this model alone, in place of the class's
        model.tie_weights(recompute_mapping=False)


def _replace_dense_embedding(model: Any, name: str, new: nn.Embedding) -> None:
    """Put a dense embedding in the place of another, and give its weight to the layers tied to that."""
    tied = [model.get_submodule(other) for other in tied_layers(model, name)]
    same_weight = {module: with_parameter(module, new.weight) for module in tied}
    replace_by_identity(model, {model.get_submodule(name): new, **same_weight})


def own_factors(model: Any) -> None:
    """Make layers of their own of those that were tied to a factorized embedding and no longer have its factors.

    So adapters leave them that have trained a copy of the embedding or of the head (PEFT's `modules_to_save`).
    """
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    here = {key: parameter for key, parameter in parameters.items() if parameter.device.type != "meta"}  # not offloaded
    apart = {key for key, source in ties.items() if here.get(key) is not here.get(source)}
    layers = {name for name, module in _tied_factors(model) if {f"{name}.up.weight", f"{name}.down.weight"} & apart}
    if not layers:
        return
    heads = [module for name in layers if isinstance(module := model.get_submodule(name), LowRankTiedHead)]
    replace_by_identity(model, {head: head.untied() for head in heads})
    kept = {key: source for key, source in ties.items() if not key.startswith(tuple(f"{name}." for name in layers))}
    model.all_tied_weights_keys = kept
    model._tied_weights_keys = dict(kept)


def _tied_factors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (LowRankEmbedding, LowRankTiedHead)))


def unstack_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Give the experts that have layers among `names` linear layers of their own, such as `experts.gate_up_proj.3`."""
    owners = unstacked_names(model)
    chosen = {owners[name] for name in names if name in owners}
    replace_by_identity(model, {experts: UnstackedExperts(experts) for experts in chosen})


def restack_experts(model: nn.Module) -> None:
    """Make experts none of whose layers is factorized what they were before they were unstacked.

    The dense layers of the others get memory of their own, so that the stacked parameters can be freed.
    """
    for experts in [module for module in model.modules() if isinstance(module, UnstackedExperts)]:
        if experts.all_dense:
            replace_by_identity(model, {experts: restack(experts)})
        else:
            own_memory(experts)


def replace_by_identity(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in place of others, wherever in `model` those are children (see `class_by_children`)."""
    for parent in _all_modules(model) if replacements else ():
        children = {name: child for name, child in parent._modules.items() if child is not None}
        new = {name: replacements[child] for name, child in children.items() if child in replacements}
        for name, child in new.items():
            setattr(parent, name, child)
        if new:
            class_by_children(parent, model)


def _all_modules(model: nn.Module) -> list[nn.Module]:
    """Those of `model.modules()`, in a twentieth of its time."""
    found = {model: None}
    queue = [model]
    for module in queue:
        children = [child for child in module._modules.values() if child is not None and child not in found]
        found.update(dict.fromkeys(children))
        queue.extend(dict.fromkeys(children))
    return queue


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def is_low_rank(model: nn.Module) -> bool:
    """Whether a model is of a low-rank class, of which this file knows nothing else."""
    return hasattr(model, "describe_layers")
