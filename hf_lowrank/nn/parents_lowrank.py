"""A module some of whose children are factorized → the same module, of a class of its own.

vLLM decides by a module's class and the names of its children how their layers are merged, on the first block for all:
a block with factorized layers must not pass for one without, nor for one in which others are factorized.

This file travels with saved checkpoints as remote code: see modeling_lowrank.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .layers_lowrank import LowRankLayer

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # what they do with their children does not depend on names
_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def class_by_children(parent: nn.Module, model: nn.Module) -> None:
    """Give `parent`, a module of `model`, the class that its children ask for: its own again if none is factorized.

    Models keep their class, and so do the blocks that `_no_split_modules` names: FSDP wraps the instances of one class
    of that name. Blocks do not merge the layers of their attention and feed-forward modules.
    """
    dense = dense_class_of(parent)
    whole = getattr(model, "_no_split_modules", None) or ()
    names = tuple(name for name, child in parent.named_children() if isinstance(child, LowRankLayer))
    keeps = isinstance(parent, (PreTrainedModel, *_CONTAINERS)) or dense.__name__ in whole or not names
    wanted = dense if keeps else _class_for(dense, names)
    if type(parent) is not wanted:
        parent.__class__ = wanted


def dense_class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has where none of its children is factorized."""
    return getattr(type(module), "_dense_class", type(module))


def _class_for(dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass that goes by the name of its base, as some code looks for classes by name."""
    if (dense, names) not in _classes:
        namespace = {
            "__module__": dense.__module__,
            "__qualname__": dense.__qualname__,
            "__doc__": dense.__doc__,
            "__reduce_ex__": _reduce,
            "_dense_class": dense,
            "_factorized_children": names,
        }
        _classes[dense, names] = type(dense.__name__, (dense,), namespace)
    return _classes[dense, names]


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """For pickle and copy: by its base and its children's names, as the class itself cannot be looked up."""
    _, _, *state = super(type(module), module).__reduce_ex__(max(protocol, 2))
    return (_new, (module._dense_class, module._factorized_children), *state)


def _new(dense: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _class_for(dense, names)
    return made.__new__(made)
