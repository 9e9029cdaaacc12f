"""From the ranks of a config to the modules of a model, and from a checkpoint's weights to those that it must have.

This file travels with saved checkpoints as remote code: see modeling_lowrank.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .editing_lowrank import (
    refuse_tied,
    replace_by_identity,
    replace_embedding,
    restack_experts,
    submodule,
    unstack_experts,
)
from .experts_lowrank import UnstackedExperts, unstacked_names
from .layers_lowrank import (
    CONVOLUTIONS,
    InterpolativeLinear,
    LowRankEmbedding,
    LowRankLayer,
    LowRankLinear,
    LowRankTiedHead,
    layer_class_for,
)


@dataclasses.dataclass(frozen=True)
class RankMatch:
    """`config.ranks`, which names the modules of the model that was saved, seen from another head of the same model."""

    ranks: dict[str, int]  # names in this model
    forms: dict[str, str]  # of those that are no plain factors
    absent: tuple[str, ...]  # names, as saved, of modules of the shared body that this model does not have
    renamed: bool  # another version of transformers saved the checkpoint, and called some modules otherwise


def match_ranks(model: PreTrainedModel, saved_ranks: Mapping[str, int], saved_forms: Mapping[str, str]) -> RankMatch:
    """Find the modules that `saved_ranks` names: the same ones, with or without the prefix of the model's body.

    Raises:
        ValueError: the same model class was saved, and it has no module of that name.
    """
    here = {name for name, _ in model.named_modules(remove_duplicate=False)}
    here |= set(unstacked_names(model))
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}  # as saved → here
    unmatched: list[str] = []
    for name in saved_ranks:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        found = next((candidate for candidate in candidates if candidate in here), None)
        if found is None:
            unmatched.append(name)
        else:
            names[name] = found
    renamed = _todays_names(model, unmatched) if unmatched else {}
    names.update({name: renamed[name] for name in unmatched if renamed[name] in here})
    absent = [name for name in unmatched if renamed[name] not in here]
    if absent and getattr(model.config, "architectures", None) == [type(model).__name__]:
        raise ValueError(
            f"`config.ranks` names {absent[0]!r}, which {type(model).__name__} of transformers "
            f"{transformers.__version__} does not have: correct the config, or use the transformers version that the "
            "checkpoint was saved with"
        )
    if len(set(names.values())) < len(names):
        twice = [name for name, found in names.items() if list(names.values()).count(found) > 1]
        raise ValueError(f"`config.ranks` names one module twice, as {twice[0]!r} and as {twice[1]!r}")
    return RankMatch(
        ranks={here: saved_ranks[name] for name, here in names.items()},
        forms={here: saved_forms[name] for name, here in names.items() if name in saved_forms},
        absent=tuple(name for name in absent if name.startswith(prefix)),
        renamed=len(absent) < len(unmatched),
    )


def _todays_names(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """{name in another transformers version: name today}, by the renamings that the base model's checkpoints get."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    today = {}
    for name in names:
        key = f"{name}.weight"  # renamings are written for parameters
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        today[name] = key.removesuffix(".weight")
    return today


def swap_in_empty_layers(model: PreTrainedModel, ranks: Mapping[str, int], forms: Mapping[str, str]) -> None:
    """Replace every module of `ranks` by an empty layer of its form, under every name it is reached by.

    Raises:
        ValueError: a module that is not linear or is tied, or a rank that does not fit it.
    """
    unstack_experts(model, ranks)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, rank in ranks.items():
        module = model.get_submodule(name)
        if isinstance(module, LowRankLayer):
            continue  # heads that build their body with AutoModel.from_config get a body which is low-rank already
        try:
            new = layer_class_for(module, forms.get(name, LowRankLinear.form)).like(module, rank)
        except ValueError as error:
            raise ValueError(f"`config.ranks` does not fit the model: {name}: {error}") from error
        if isinstance(new, LowRankEmbedding):
            replace_embedding(model, name, new)
        else:
            refuse_tied(model, name)
            replacements[module] = new
    replace_by_identity(model, replacements)
    restack_experts(model)


def split_parallel_plan(model: PreTrainedModel) -> None:
    """Rewrite the tensor-parallel plan for the factors, and leave unstacked experts out of the parallel plans.

    A column-parallel layer shards the rows of `up`, a row-parallel one the columns of `down`: the sum over the devices
    is then one of activations of width r. The other factor is whole on every device, which the plan says too: vLLM and
    SGLang take the first pattern that a name begins with, and that of the dense layer, which other blocks may still
    have, would be it.
    """
    _keep_experts_whole(model)
    plan: dict[str, str] | None = getattr(model, "_tp_plan", None)
    if not plan:
        return
    if any(isinstance(module, InterpolativeLinear) for module in model.modules()):
        model._tp_plan = {}  # such a layer needs its whole input
        return
    factors: dict[str, str] = {}
    for name, module in model.named_modules():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        if isinstance(module, (LowRankEmbedding, LowRankTiedHead)):
            plan.pop(pattern, None)  # its factors may be shared, and stay whole
        elif isinstance(module, LowRankLayer) and pattern in plan:
            factors |= _styles_of_factors(pattern, plan[pattern])
    model._tp_plan = factors | plan


def _styles_of_factors(pattern: str, style: str) -> dict[str, str]:
    sharded, whole = ("down", "up") if "rowwise" in style else ("up", "down")
    if "replicate" in ALL_PARALLEL_STYLES:
        return {f"{pattern}.{sharded}": style, f"{pattern}.{whole}": "replicate"}
    # An older transformers has no name for it: its one style of whole weights sums their gradients over the devices,
    # and those of a factor are whole on each of them. With the `\b` it is for those alone that match patterns.
    return {f"{pattern}.{sharded}": style, rf"{pattern}.{whole}\b": "replicated_with_grad_allreduce"}


def unhook_low_rank_layers(model: nn.Module) -> None:
    """Take tensor parallelism's wrapper off the layers whose factors have theirs.

    A plan knows no numbers of blocks, so where one block's layer is dense its rule meets those of the others, too.
    """
    for module in model.modules():
        if isinstance(module, LowRankLayer):
            vars(module).pop("forward", None)


def _keep_experts_whole(model: PreTrainedModel) -> None:
    """Drop the plans for experts, tensor-parallel and expert-parallel, where they are unstacked: they have no stack."""
    unstacked = [name for name, module in model.named_modules() if isinstance(module, UnstackedExperts)]
    for pattern in {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in unstacked}:
        for plan in (getattr(model, "_tp_plan", None) or {}, getattr(model, "_ep_plan", None) or {}):
            for key in [key for key in plan if key == pattern or key.startswith(f"{pattern}.")]:
                del plan[key]


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS))


def refuse_bad_factors(model: Any, info: Any) -> None:
    """Compare what was loaded with `config.ranks`, before transformers initializes whatever it did not find.

    Args:
        info: transformers' record of missing, mismatched and unexpected keys.

    Raises:
        ValueError: factors are missing, have another rank, or belong to a layer that `config.ranks` does not name.
    """
    for key, found, expected in sorted(info.mismatched_keys):
        if (name := _factorized_layer_of(model, key)) is not None:
            raise ValueError(
                f"{name} has rank {model.get_submodule(name).rank} in config.json, so {key} must have the shape "
                f"{list(expected)}, but it has {list(found)} in the checkpoint: {_REMEDY}"
            )
    for key in sorted(info.missing_keys - model.all_tied_weights_keys.keys()):
        if (name := _factorized_layer_of(model, key)) is not None and not _is_loaded(model, key):
            raise ValueError(
                f"{name} has rank {model.get_submodule(name).rank} in config.json, but the checkpoint lacks {key}, of "
                f"shape {list(model.get_parameter_or_buffer(key).shape)}: {_REMEDY}"
            )
    for key in sorted(info.unexpected_keys):
        if (name := _dense_layer_of_factor(model, key)) is not None:
            raise ValueError(
                f"The checkpoint holds a factor {key}, but `ranks` in config.json does not name {name}, which would "
                f"get random weights: {_REMEDY}"
            )
    _refuse_renamed_layers(model, info)
    _refuse_absent_blocks(model, info)


_REMEDY = "config.json and the weights are of different models, save or download the folder again"


def _factorized_layer_of(model: nn.Module, key: str) -> str | None:
    """The name of the factorized layer that the parameter `key` belongs to, if it does."""
    name = key.rpartition(".")[0]
    while name := name.rpartition(".")[0]:
        if isinstance(submodule(model, name), LowRankLayer):
            return name
    return None


def _dense_layer_of_factor(model: PreTrainedModel, key: str) -> str | None:
    """The name of the dense layer that stands where the checkpoint has the factor `key`, if one does."""
    match = re.fullmatch(r"(.+)\.(?:up|down|down\.rest)\.weight", key)
    if match is None:
        return None
    prefix = f"{model.base_model_prefix}."
    candidates = (match[1], match[1].removeprefix(prefix), prefix + match[1])
    stacked = unstacked_names(model)
    return next((n for n in candidates if n in stacked or _is_dense(submodule(model, n) or nn.Identity())), None)


def _is_loaded(model: PreTrainedModel, key: str) -> bool:
    """Whether a parameter has its values, under another name of the module it belongs to."""
    return getattr(model.get_parameter_or_buffer(key), "_is_hf_initialized", False)


def _refuse_renamed_layers(model: Any, info: Any) -> None:
    """A layer of the body may be absent here (a pooler), unless the body has another that the checkpoint lacks."""
    if model._rank_match is None or not model._rank_match.absent:
        return
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for key in sorted(info.missing_keys):
        if key.startswith(prefix) and _is_dense(submodule(model, key.rpartition(".")[0]) or nn.Identity()):
            raise ValueError(
                f"`config.ranks` names {model._rank_match.absent[0]!r}, which {type(model).__name__} of transformers "
                f"{transformers.__version__} does not have, and the checkpoint lacks {key}: was it saved with a "
                "version that names its modules otherwise? Load it with that one"
            )


def _refuse_absent_blocks(model: Any, info: Any) -> None:
    """The class that was saved has all its blocks in the checkpoint: a config that asks for more is refused, before
    they get memory and random weights."""
    if getattr(model.config, "architectures", None) != [type(model).__name__]:
        return
    for key in sorted(info.missing_keys - model.all_tied_weights_keys.keys()):
        if re.search(r"\.\d+\.", key) and not _is_loaded(model, key):
            raise ValueError(f"config.json asks for {key}, which the checkpoint lacks: {_REMEDY}")
