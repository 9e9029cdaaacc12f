"""Low-rank models: any transformers model with some of its layers replaced by two thinner ones.

A low-rank BERT classifier is a `LowRankBertForSequenceClassification(BertForSequenceClassification)`. The class is
made on demand; building it builds the base model and then swaps in the layers that `config.ranks` names. Under
`from_pretrained` this happens on the meta device, so weights load as in every other model: sharded, in any dtype,
with a device map.

This file travels with saved checkpoints as remote code: it imports nothing but the standard library, torch,
transformers with its huggingface_hub, and the files of the configuration, the layers and the experts next to it.
"""

from __future__ import annotations

import copy
import dataclasses
import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from torch import nn
from transformers import AutoConfig, AutoProcessor
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
    video_processing_auto,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .configuration_lowrank import (
    MODEL_TYPE,
    LowRankConfig,
    LowRankConfigMixin,
    config_class_for,
    on_config_class_created,
)
from .experts_lowrank import UnstackedExperts, own_memory, projections, restack, unstacked_names
from .layers_lowrank import (
    CONVOLUTIONS,
    InterpolativeLinear,
    LowRankEmbedding,
    LowRankLayer,
    LowRankLinear,
    LowRankTiedHead,
    initialize_factors,
    layer_class_for,
)

# For the type checker the mixin is a model; for Python it is not, as transformers inspects the bases of a model class.
if TYPE_CHECKING:
    _ModelBase = PreTrainedModel
else:
    _ModelBase = object


# ---------------------------------------------------------------------------------------------------------------------
# Editing a model
# ---------------------------------------------------------------------------------------------------------------------


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module called `name`, under every name it is reached by (a shared module stays shared).

    With an embedding, the layers whose weight is tied to its weight are replaced, and tied to its factors. Experts of
    which it is a layer are unstacked first (see `unstack_experts`).

    `config.ranks` and `config.forms` of a low-rank model are kept up to date.

    Raises:
        ValueError: there is no such module, or its weight is tied to another one (the tie would be lost).
    """
    if _submodule(model, name) is None:
        unstack_experts(model, [name])
    if _submodule(model, name) is not None and _replace_expert_layer(model, name, new):
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise ValueError(f"{type(model).__name__} has no module called {name!r}")
    if isinstance(new, LowRankEmbedding):
        _replace_embedding(model, name, new)
    else:
        _refuse_tied(model, name)
        replace_by_identity(model, {modules[name]: new})
    if isinstance(model, LowRankMixin):
        model._describe_layers()


def _replace_expert_layer(model: nn.Module, name: str, new: nn.Module) -> bool:
    """Replace a layer of unstacked experts, if it is one, without a walk through the model: it may have thousands."""
    prefix, *layer = name.rsplit(".", 2)
    experts = _submodule(model, prefix)
    if not isinstance(experts, UnstackedExperts) or len(layer) < 2 or layer[0] not in projections(experts):
        return False
    getattr(experts, layer[0])[int(layer[1])] = new
    if isinstance(model, LowRankMixin):
        model._describe_layer(name, new)
    return True


def _refuse_tied(model: nn.Module, name: str) -> None:
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
    if (source := ties.get(f"{name}.weight")) is not None:
        raise ValueError(f"{name} cannot be replaced: its weight is tied to {source}, replace that one")
    tied = [one.rpartition(".")[0] for one, other in ties.items() if other == f"{name}.weight"]
    embedding = model.get_submodule(name)
    return [one for one in tied if model.get_submodule(one) is not embedding]


def _replace_embedding(model: Any, name: str, new: LowRankEmbedding) -> None:
    tied = tied_layers(model, name)
    replacements: dict[nn.Module, nn.Module] = {model.get_submodule(name): new}
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    for other in tied:
        module = model.get_submodule(other)
        if type(module) is nn.Embedding:
            replacements[module] = LowRankEmbedding.like(module, new.rank)
        elif type(module) is nn.Linear:
            replacements[module] = LowRankTiedHead.like(module, new.rank)
        else:
            raise ValueError(f"{name} cannot be replaced: its weight is tied to a {type(module).__name__}, {other}")
    replace_by_identity(model, replacements)
    for key in [key for key, source in ties.items() if source == f"{name}.weight"]:
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
    """Put modules in place of others, wherever in `model` those are children."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, child_name, replacements[child])


# ---------------------------------------------------------------------------------------------------------------------
# From the ranks of a config to the modules of a model
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _RankMatch:
    """`config.ranks`, which names the modules of the model that was saved, seen from another head of the same model."""

    ranks: dict[str, int]  # names in this model
    forms: dict[str, str]  # of those that are no plain factors
    absent: tuple[str, ...]  # names, as saved, of modules of the shared body that this model does not have
    renamed: bool  # another version of transformers saved the checkpoint, and called some modules otherwise


def _match_ranks(model: PreTrainedModel, saved_ranks: Mapping[str, int], saved_forms: Mapping[str, str]) -> _RankMatch:
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
    return _RankMatch(
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


def _swap_in_empty_layers(model: PreTrainedModel, ranks: Mapping[str, int], forms: Mapping[str, str]) -> None:
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
            _replace_embedding(model, name, new)
        else:
            _refuse_tied(model, name)
            replacements[module] = new
    replace_by_identity(model, replacements)
    restack_experts(model)


def _split_parallel_plan(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """Rewrite the tensor-parallel plan for the factors, and leave unstacked experts out of the parallel plans.

    A column-parallel layer shards the rows of `up`, a row-parallel one the columns of `down`: the sum over the devices
    is then one of activations of width r.
    """
    _keep_experts_whole(model)
    plan: dict[str, str] | None = getattr(model, "_tp_plan", None)
    if not plan:
        return
    if any(isinstance(module, InterpolativeLinear) for module in model.modules()):
        model._tp_plan = {}  # such a layer needs its whole input
        return
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in ranks}
    for pattern in patterns & plan.keys():
        style = plan[pattern]
        plan[f"{pattern}.{'down' if style.startswith('rowwise') else 'up'}"] = style
    dense = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, module in model.named_modules() if _is_dense(module)}
    for pattern in patterns & plan.keys() - dense:
        del plan[pattern]


def _keep_experts_whole(model: PreTrainedModel) -> None:
    """Drop the plans for experts, tensor-parallel and expert-parallel, where they are unstacked: they have no stack."""
    unstacked = [name for name, module in model.named_modules() if isinstance(module, UnstackedExperts)]
    for pattern in {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in unstacked}:
        for plan in (getattr(model, "_tp_plan", None) or {}, getattr(model, "_ep_plan", None) or {}):
            for key in [key for key in plan if key == pattern or key.startswith(f"{pattern}.")]:
                del plan[key]


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS))


# ---------------------------------------------------------------------------------------------------------------------
# Checking a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_bad_factors(model: LowRankMixin, info: Any) -> None:
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
        if isinstance(_submodule(model, name), LowRankLayer):
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
    return next((n for n in candidates if n in stacked or _is_dense(_submodule(model, n) or nn.Identity())), None)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_loaded(model: PreTrainedModel, key: str) -> bool:
    """Whether a parameter has its values, under another name of the module it belongs to."""
    return getattr(model.get_parameter_or_buffer(key), "_is_hf_initialized", False)


def _refuse_renamed_layers(model: LowRankMixin, info: Any) -> None:
    """A layer of the body may be absent here (a pooler), unless the body has another that the checkpoint lacks."""
    if model._rank_match is None or not model._rank_match.absent:
        return
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for key in sorted(info.missing_keys):
        if key.startswith(prefix) and _is_dense(_submodule(model, key.rpartition(".")[0]) or nn.Identity()):
            raise ValueError(
                f"`config.ranks` names {model._rank_match.absent[0]!r}, which {type(model).__name__} of transformers "
                f"{transformers.__version__} does not have, and the checkpoint lacks {key}: was it saved with a "
                "version that names its modules otherwise? Load it with that one"
            )


def _refuse_absent_blocks(model: LowRankMixin, info: Any) -> None:
    """The class that was saved has all its blocks in the checkpoint: a config that asks for more is refused, before
    they get memory and random weights."""
    if getattr(model.config, "architectures", None) != [type(model).__name__]:
        return
    for key in sorted(info.missing_keys - model.all_tied_weights_keys.keys()):
        if re.search(r"\.\d+\.", key) and not _is_loaded(model, key):
            raise ValueError(f"config.json asks for {key}, which the checkpoint lacks: {_REMEDY}")


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


class LowRankMixin(_ModelBase):
    """Mixed in front of a transformers model class: builds it, then swaps in the layers that `config.ranks` names."""

    base_model_class: ClassVar[type[PreTrainedModel]]
    compression_report: Any = None  # of a model that was compressed in this process
    _rank_match: _RankMatch | None = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # `config.ranks` stays as it is: a head may hand the same config to the Auto class that builds its body.
        self._rank_match = _match_ranks(self, config.ranks, config.forms)
        _swap_in_empty_layers(self, self._rank_match.ranks, self._rank_match.forms)
        _split_parallel_plan(self, self._rank_match.ranks)
        self.init_weights()  # of the new layers; the rest is initialized, and on the meta device nothing happens

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        """As `PreTrainedModel.get_init_context`, for `from_pretrained`, and without drawing random weights.

        On the meta device they come to nothing, but take as long as the loading of the factors.
        """
        return [*super().get_init_context(*args, **kwargs), init.no_init_weights()]

    @property
    def lowrank_ranks(self) -> dict[str, int]:
        """{name: rank} of every factorized layer; one that is tied to another goes by the name of that one."""
        return {name: layer.rank for name, layer in self.factorized_layers().items()}

    def factorized_layers(self) -> dict[str, LowRankLayer]:
        """The factorized layers by name, those tied to another one apart."""
        ties: Mapping[str, str] = getattr(self, "all_tied_weights_keys", {})
        layers = {name: module for name, module in self.named_modules() if isinstance(module, LowRankLayer)}
        return {name: layer for name, layer in layers.items() if f"{name}.up.weight" not in ties}

    def _describe_layers(self) -> None:
        """Bring `config.ranks` and `config.forms` up to date."""
        self.config.ranks = self.lowrank_ranks
        forms = {name: layer.form for name, layer in self.factorized_layers().items()}
        self.config.forms = {name: form for name, form in forms.items() if form != LowRankLayer.form}

    def _describe_layer(self, name: str, layer: nn.Module) -> None:
        """The same for one layer."""
        for known in (self.config.ranks, self.config.forms):
            known.pop(name, None)
        if isinstance(layer, LowRankLayer):
            self.config.ranks[name] = layer.rank
            if layer.form != LowRankLayer.form:
                self.config.forms[name] = layer.form

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the ranks and the source files that loading needs.

        The source files come first, config.json next and the weights last, so that a save which breaks off leaves a
        folder that fails to load, not one that loads as something else.
        """
        self._describe_layers()
        for module in self.modules():
            if isinstance(module, UnstackedExperts):
                own_memory(module)  # safetensors stores no views
        self.config.auto_map = _auto_map(type(self), self.config)
        # The base architecture's conversions are for dense weights, and some would take factors for them.
        kwargs["save_original_format"] = False
        push = kwargs.pop("push_to_hub", False)  # transformers would write its own card over the folder's
        hub = {key: kwargs.pop(key) for key in ("repo_id", *_HUB_OPTIONS) if push and key in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if push:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """As `PreTrainedModel.push_to_hub`, with the tokenizer (or processor) and a model card, all in one commit.

        The tokenizer is that of the folder or repository the model was loaded from. So are the card and the record of
        the compression, if the weights are still the same; after fine-tuning they are not, and the card's figures would
        be of another model. A card that the repository has is never replaced by one that says less.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            _add_companions(self, Path(folder), repo_id, tags)
            paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
            message = commit_message or f"Upload {type(self).__name__}"
            return commit_files(paths, repo_id, message, commit_description, private, token, revision, create_pr)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        load = type(model).base_model_class._load_pretrained_model
        if args or kwargs or getattr(model, "_hf_peft_config_loaded", False):  # an adapter, with names of its own
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        load_config = dataclasses.replace(load_config, weight_mapping=_conversions_for_factors(model, load_config))
        info, *others = load(model, state_dict, checkpoint_files, load_config)
        _refuse_bad_factors(model, info)
        return (info, *others)

    def initialize_weights(self) -> None:
        layers = [module for module in self.modules() if isinstance(module, LowRankLayer)]
        for layer in layers:
            initialize_factors(layer, std=getattr(self.config, "initializer_range", None) or 0.02)
        with _lent_biases(layers):
            super().initialize_weights()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # The base class's patterns are for dense weights; a factorized embedding is tied by its factors.
        if all_submodels and any(isinstance(module, LowRankEmbedding) for module in self.modules()):
            return dict(self.all_tied_weights_keys)
        return super().get_expanded_tied_weights_keys(all_submodels)

    def _get_resized_embeddings(self, old_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(old_embeddings, LowRankEmbedding):
            return super()._get_resized_embeddings(old_embeddings, *args, **kwargs)
        old_embeddings.down = super()._get_resized_embeddings(old_embeddings.down, *args, **kwargs)
        old_embeddings.num_embeddings = old_embeddings.in_features = len(old_embeddings.down.weight)
        return old_embeddings

    def _get_resized_lm_head(self, old_lm_head: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(old_lm_head, LowRankTiedHead):
            return super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        embedding: Any = self.get_input_embeddings()
        old_lm_head.out_features = embedding.num_embeddings
        return old_lm_head  # gets its weight by being tied

    def _get_name(self) -> str:
        # Trainer decides by this name whether label smoothing has to shift the labels.
        return self.base_model_class.__name__

    # transformers asks the following of the module a class is defined in: answer for the base class.

    @classmethod
    def is_custom_code(cls) -> bool:
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.base_model_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.base_model_class._can_set_experts_implementation()


@contextmanager
def _lent_biases(layers: Iterable[LowRankLayer]) -> Iterator[None]:
    """Within the block no factor lacks a bias: some base classes' `_init_weights` write to that of every layer."""
    factors = [factor for layer in layers for factor in layer.linear_factors()]
    without = [factor._parameters for factor in factors if "bias" in factor._parameters and factor.bias is None]
    lent = nn.Parameter(torch.empty(0), requires_grad=False)
    try:
        for parameters in without:
            parameters["bias"] = lent
        yield
    finally:
        for parameters in without:
            parameters["bias"] = None


def _conversions_for_factors(model: LowRankMixin, load_config: Any) -> list[Any]:
    """The conversions that apply to a low-rank checkpoint, which holds the model's own names.

    Those of the base architecture (merge experts, permute rotary heads, …) do not; renamings between transformers
    versions do, and the quantizer's.
    """
    conversions = []
    if model._rank_match is not None and model._rank_match.renamed:
        conversions = [c for c in load_config.weight_mapping or [] if isinstance(c, WeightRenaming)]
    if load_config.hf_quantizer is not None:
        conversions = load_config.hf_quantizer.update_weight_conversions(conversions, model)
    return conversions


def to_low_rank_class(model: PreTrainedModel) -> Any:
    """Turn a transformers model, in place, into its low-rank class, with no layer factorized yet. Returns the model.

    Its config is replaced by a copy, so that another model built from the same config object stays as it is. A model
    that is low-rank already is returned unchanged.

    Raises:
        ValueError: not a model whose class is part of transformers.
    """
    if isinstance(model, LowRankMixin):
        return model
    _refuse_foreign_class(model)
    copies: dict[int, Any] = {}  # deepcopy's memo: what the copy of an object is, by the object's id
    config = copy.deepcopy(model.config, copies)
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, attribute, copies[id(value)])
    config.__class__ = config_class_for(type(config))
    config.ranks, config.forms = {}, {}
    model.__class__ = model_class_for(type(model))
    return model


def _refuse_foreign_class(model: Any) -> None:
    model_class = type(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "Only transformers models can be factorized, and this is a "
            f"{model_class.__module__}.{model_class.__qualname__}: pass the transformers model inside of it (after "
            "merging, if it has an adapter)"
        )
    if not model_class.__module__.startswith("transformers."):
        raise ValueError(
            f"{model_class.__qualname__} is defined in {model_class.__module__} and not in transformers, so its code "
            "would not be found when the saved model is loaded; if it is a low-rank model loaded with "
            "`trust_remote_code=True`, import hf_lowrank first and load it again without"
        )
    if model.config.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{model_class.__name__} has the model type {model.config.model_type!r}, which AutoConfig does not know: "
            "factorize the model that contains it"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Publishing
# ---------------------------------------------------------------------------------------------------------------------

CARD, RECORD, PICTURE = "README.md", "compression.json", "ranks.png"
# What a repository may hold of an earlier model, and `from_pretrained` would prefer to the weights of this one.
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

_HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")

CardWriter = Callable[[Any, Path, str], bool]
_card_writers: list[CardWriter] = []
logger = logging.get_logger(__name__)


def on_push(writer: CardWriter) -> None:
    """Let `writer(model, folder, repo_id)` write the card of models that are pushed; it returns whether it did."""
    _card_writers.append(writer)


def commit_files(
    paths: Mapping[str, Path],
    repo_id: str,
    message: str,
    description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload {name: file} to the Hub in one commit, which also removes the weights that they replace.

    The repository and the branch `revision` are made if need be. No file is visible before all of them are.
    """
    api = HfApi(library_name="transformers", library_version=transformers.__version__)
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    stored = api.list_repo_files(repo_id, revision=revision, token=token)
    if CARD in stored and CARD in paths and _MINIMAL in paths[CARD].read_text(encoding="utf-8"):
        paths = {name: path for name, path in paths.items() if name != CARD}
        logger.warning(f"The model card of {repo_id} is kept: look whether it is still true of the new weights.")
    replaced = [CommitOperationDelete(name) for name in stored if _WEIGHTS.fullmatch(name) and name not in paths]
    return api.create_commit(
        repo_id,
        [*replaced, *(CommitOperationAdd(name, path) for name, path in sorted(paths.items()))],
        commit_message=message,
        commit_description=description,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def _add_companions(model: LowRankMixin, folder: Path, repo_id: str, tags: list[str] | None) -> None:
    """Put beside the model what lay beside it where it was loaded from, and a card."""
    origin = model.name_or_path

    def stored(name: str) -> str | None:
        return cached_file(origin, name, **_NO_ERRORS) if origin else None

    try:
        if not any(map(stored, _PREPROCESSING)):  # transformers would make up a tokenizer that knows no words
            raise OSError("there is none")
        # Explicitly no: by default transformers would ask whether to run code of the base model's repository.
        processor = AutoProcessor.from_pretrained(origin, config=model.config, trust_remote_code=False)
        processor.save_pretrained(folder)
    except (OSError, ValueError) as error:
        logger.warning(f"Push a tokenizer or processor too: of where the model was loaded, {origin!r}, {error}")

    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    if all((old := stored(path.name)) and filecmp.cmp(path, old, shallow=False) for path in weights):
        for name in (CARD, RECORD, PICTURE):
            if found := stored(name):
                shutil.copyfile(found, folder / name)
    card = folder / CARD
    if card.exists():
        card.write_text(card_for(card.read_text(encoding="utf-8"), repo_id), encoding="utf-8")
    elif not any(writer(model, folder, repo_id) for writer in _card_writers):
        minimal_card(model, repo_id).save(card)
    if tags:
        tagged = ModelCard.load(card)
        tagged.data.tags = list(dict.fromkeys([*(tagged.data.tags or []), *tags]))
        tagged.save(card)


_PREPROCESSING = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
_NO_ERRORS = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}


def card_for(card: str, name: str) -> str:
    """A card's text for another `name` of the model: in its first heading, in its code and in its scores."""
    old = card_name(card)
    if old is None:
        return card
    card = card.replace(f"# {old}\n", f"# {name}\n", 1).replace(f'"{old}"', f'"{name}"')
    return card.replace(f"- name: {old.rpartition('/')[2]}\n", f"- name: {name.rpartition('/')[2]}\n", 1)


def card_name(card: str) -> str | None:
    """The first heading of a card, which is the name of its model."""
    body = card.partition("\n---\n")[2] if card.startswith("---\n") else card  # metadata may hold comments
    heading = re.search(r"^# (.+)$", body, re.MULTILINE)
    return heading and heading[1].strip()


_MINIMAL = "This card was written when the model was pushed, without a record of how it was made."


def minimal_card(model: LowRankMixin, repo_id: str) -> ModelCard:
    """What can be said of a model without the record of its compression: how to load it."""
    auto_class = auto_class_of(model)
    data = ModelCardData(library_name="transformers", tags=["low-rank", "custom_code"])
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {repo_id}

A {model.base_model_class.__name__} with {len(model.lowrank_ranks)} of its layers factorized to low rank.
{_MINIMAL}

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
```

With the library hf_lowrank imported, `trust_remote_code` is not needed. Load it by the Auto classes:
{model.base_model_class.__name__} itself cannot read it, and would give random layers.
"""
    )


def auto_class_of(model: LowRankMixin) -> str:
    """The name of the Auto class that loads a model as what it is."""
    names = []
    for name, mapping in _auto_classes_of(model.config.base_config_class):
        known = mapping[model.config.base_config_class]
        if model.base_model_class in (known if isinstance(known, (list, tuple)) else (known,)):
            names.append(name)
    return min(names, key=lambda name: name == "AutoModelForPreTraining", default="AutoModel")


_model_classes: dict[type[PreTrainedModel], type[LowRankMixin]] = {}


def model_class_for(base_model_class: type[PreTrainedModel]) -> type[LowRankMixin]:
    """The low-rank class of a model class, made on the first call; a low-rank class is returned as it is."""
    if issubclass(base_model_class, LowRankMixin):
        return base_model_class
    if base_model_class.config_class is None:
        raise ValueError(f"{base_model_class.__name__} has no config class")
    config_class = config_class_for(base_model_class.config_class)  # registers its models, so it may make this one
    if base_model_class not in _model_classes:
        name = f"LowRank{base_model_class.__name__}"
        namespace = {
            "__module__": __name__,
            "__doc__": f"{base_model_class.__name__} with the linear layers named in `config.ranks` factorized.",
            "config_class": config_class,
            "base_model_class": base_model_class,
        }
        _model_classes[base_model_class] = type(name, (LowRankMixin, base_model_class), namespace)
        conversions = get_checkpoint_conversion_mapping(base_model_class.__name__)
        if conversions is not None:  # some are kept by the name of the class
            register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return _model_classes[base_model_class]


# ---------------------------------------------------------------------------------------------------------------------
# The Auto classes
# ---------------------------------------------------------------------------------------------------------------------

_PREPROCESSOR_MAPPINGS = (
    tokenization_auto.TOKENIZER_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
    video_processing_auto.VIDEO_PROCESSOR_MAPPING,
)


def register() -> None:
    """Let AutoConfig load "lowrank" checkpoints, and with it every AutoModelFor…, in this process."""
    AutoConfig.register(MODEL_TYPE, LowRankConfig, exist_ok=True)


def _auto_classes_of(base_config_class: type[PreTrainedConfig]) -> Iterator[tuple[str, Any]]:
    """(name, mapping) of every AutoModelFor… that knows the architecture."""
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and base_config_class in mapping:
            yield name, mapping


def _register_config_class(config_class: type[LowRankConfigMixin]) -> None:
    """Enter a new config class into every Auto mapping that has its base.

    Into the mappings themselves, since some hold several classes, or a class of another config, which `register` of an
    Auto class refuses. Pipelines look up the names of the classes there.
    """
    base = config_class.base_config_class
    for _, mapping in _auto_classes_of(base):
        known = mapping[base]
        several = isinstance(known, (list, tuple))
        mapping.register(
            config_class,
            tuple(model_class_for(one) for one in known) if several else model_class_for(known),
            exist_ok=True,
        )
    for mapping in _PREPROCESSOR_MAPPINGS:
        if base in mapping:
            mapping.register(config_class, mapping[base], exist_ok=True)


on_config_class_created(_register_config_class)


def _auto_map(model_class: type[LowRankMixin], config: Any) -> dict[str, str]:
    """{Auto class: its class in the source files of the checkpoint}, for loading with `trust_remote_code`.

    All of them from this file, the config too: transformers loads a local folder's code by a hash of the files that it
    imports, so by its own file the config class would be another one than that of the models.
    """
    auto_map = {"AutoConfig": f"modeling_lowrank.{LowRankConfig.__name__}"}
    for auto_name, mapping in _auto_classes_of(config.base_config_class):
        known = mapping[config.base_config_class]
        classes = list(known) if isinstance(known, (list, tuple)) else [known]
        chosen = model_class.base_model_class if model_class.base_model_class in classes else classes[0]
        auto_map[auto_name] = f"modeling_lowrank.LowRank{chosen.__name__}"
    return auto_map


def __getattr__(name: str) -> Any:
    """Generated model classes by their name: for pickle, and for the `auto_map` of a checkpoint."""
    base = getattr(transformers, name.removeprefix("LowRank"), None) if name.startswith("LowRank") else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return model_class_for(base)
    generated = [model_class for model_class in _model_classes.values() if model_class.__name__ == name]
    if not generated:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return generated[0]
