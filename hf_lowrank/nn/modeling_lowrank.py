"""Low-rank models: any transformers model with some of its layers replaced by two thinner ones.

A low-rank BERT classifier is a `LowRankBertForSequenceClassification(BertForSequenceClassification)`. The class is
made on demand; building it builds the base model and then swaps in the layers that `config.ranks` names. Under
`from_pretrained` this happens on the meta device, so weights load as in every other model: sharded, in any dtype,
with a device map.

This file travels with saved checkpoints as remote code: it imports nothing but the standard library, torch,
transformers with its huggingface_hub, and the files next to it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import nn

try:
    from transformers import initialization as init
except ImportError as error:
    raise ImportError(
        f"Low-rank checkpoints need transformers 5.5 or newer, and this is {transformers.__version__}: upgrade it, or "
        "the engine that asks for so old a one"
    ) from error
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .auto_lowrank import PREPROCESSOR_MAPPINGS, auto_classes_of, auto_map_of
from .configuration_lowrank import LowRankConfig as LowRankConfig  # which `auto_map` names
from .configuration_lowrank import (
    LowRankConfigMixin,
    config_class_for,
    on_config_class_created,
)
from .configuration_lowrank import register as register
from .editing_lowrank import own_factors
from .engines_lowrank import refuse_what_engines_cannot_run
from .experts_lowrank import UnstackedExperts, own_memory
from .layers_lowrank import (
    LowRankEmbedding,
    LowRankLayer,
    LowRankTiedHead,
    initialize_factors,
)
from .matching_lowrank import (
    RankMatch,
    match_ranks,
    refuse_bad_factors,
    split_parallel_plan,
    swap_in_empty_layers,
    unhook_low_rank_layers,
)
from .parents_lowrank import dense_class_of as dense_class_of  # older transformers fetch what this file imports, alone
from .publishing_lowrank import HUB_OPTIONS, add_companions, commit_files

# For the type checker the mixin is a model; for Python it is not, as transformers inspects the bases of a model class.
if TYPE_CHECKING:
    _ModelBase = PreTrainedModel
else:
    _ModelBase = object


class LowRankMixin(_ModelBase):
    """Mixed in front of a transformers model class: builds it, then swaps in the layers that `config.ranks` names."""

    base_model_class: ClassVar[type[PreTrainedModel]]
    compression_report: Any = None  # of a model that was compressed in this process
    _rank_match: RankMatch | None = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # `config.ranks` stays as it is: a head may hand the same config to the Auto class that builds its body.
        self._rank_match = match_ranks(self, config.ranks, config.forms)
        swap_in_empty_layers(self, self._rank_match.ranks, self._rank_match.forms)
        split_parallel_plan(self)
        refuse_what_engines_cannot_run(self)
        self.init_weights()  # of the new layers; the rest is initialized, and on the meta device nothing happens

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; packed weights are widened now, and not at the first call.

        sentence-transformers calls `forward` itself, past the hook by which compressed-tensors would do it.
        """
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with what is told of the loading
        if hasattr(model, "ct_decompress_hook"):
            model.hf_quantizer.compressor.decompress_model(model)
            _unwrap(model)
        return loaded

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

    def describe_layers(self) -> None:
        """Bring `config.ranks` and `config.forms` up to date."""
        self.config.ranks = self.lowrank_ranks
        forms = {name: layer.form for name, layer in self.factorized_layers().items()}
        self.config.forms = {name: form for name, form in forms.items() if form != LowRankLayer.form}

    def describe_layer(self, name: str, layer: nn.Module) -> None:
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
        own_factors(self)
        self.describe_layers()
        for module in self.modules():
            if isinstance(module, UnstackedExperts):
                own_memory(module)  # safetensors stores no views
        _pack_again(self)
        self.config.auto_map = auto_map_of(type(self), self.config)
        # The base architecture's conversions are for dense weights, and some would take factors for them.
        kwargs["save_original_format"] = False
        push = kwargs.pop("push_to_hub", False)  # transformers would write its own card over the folder's
        hub = {key: kwargs.pop(key) for key in ("repo_id", *HUB_OPTIONS) if push and key in kwargs}
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
            add_companions(self, Path(folder), repo_id, tags)
            paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
            message = commit_message or f"Upload {type(self).__name__}"
            return commit_files(paths, repo_id, message, commit_description, private, token, revision, create_pr)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        load = type(model).base_model_class._load_pretrained_model
        unhook_low_rank_layers(model)
        if args or kwargs or getattr(model, "_hf_peft_config_loaded", False):  # an adapter, with names of its own
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        load_config = dataclasses.replace(load_config, weight_mapping=_conversions_for_factors(model, load_config))
        info, *others = load(model, state_dict, checkpoint_files, load_config)
        refuse_bad_factors(model, info)
        return (info, *others)

    def initialize_weights(self) -> None:
        layers = [module for module in self.modules() if isinstance(module, LowRankLayer)]
        for layer in layers:
            initialize_factors(layer, std=getattr(self.config, "initializer_range", None) or 0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not hasattr(module, "weight"):
                module._is_hf_initialized = True  # type: ignore[assignment]  # packed by a quantizer: it was loaded
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


def _pack_again(model: Any) -> None:
    """Pack the weights of a model in the format of compressed-tensors that a forward pass has widened.

    In float32, as half precision is not exact enough to find the numbers that were rounded to.
    """
    compressor = getattr(model, "packed_by", None) or getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None:
        return
    dtype = model.dtype
    rounded = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
    for module in rounded:
        module.float()
    compressor.compress_model(model, skip_compressed=True)
    for module in rounded:
        module.to(dtype)


def _unwrap(model: nn.Module) -> None:
    """Let modules whose weights are where they are used be called as they are, not through compressed-tensors.

    It hands weights from one device to another around every call, and makes plain dicts of outputs that are handed on,
    which decoders cannot read. Weights that are kept elsewhere stay in its care.
    """
    offload: Any = import_module("compressed_tensors.offload.module")  # not as a statement: not everybody has it
    for module in model.modules():
        weights: Any = module._parameters
        if str(getattr(weights, "onload_device", "")) == str(getattr(weights, "offload_device", None)):
            offload.remove_module_offload(module, onload_tensors=True)


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
        # By the class, too: which outputs are recorded. It is entered where a model is built, and one whose class is
        # changed in place is built already.
        _CAN_RECORD_REGISTRY.update({str(_model_classes[base_model_class]): base_model_class._can_record_outputs})
    return _model_classes[base_model_class]


def _register_config_class(config_class: type[LowRankConfigMixin]) -> None:
    """Enter a new config class into every Auto mapping that has its base.

    Into the mappings themselves, since some hold several classes, or a class of another config, which `register` of an
    Auto class refuses. Pipelines look up the names of the classes there.
    """
    base = config_class.base_config_class
    for _, mapping in auto_classes_of(base):
        known = mapping[base]
        several = isinstance(known, (list, tuple))
        mapping.register(
            config_class,
            tuple(model_class_for(one) for one in known) if several else model_class_for(known),
            exist_ok=True,
        )
    for mapping in PREPROCESSOR_MAPPINGS:
        if base in mapping:
            mapping.register(config_class, mapping[base], exist_ok=True)


on_config_class_created(_register_config_class)


def __getattr__(name: str) -> Any:
    """Generated model classes by their name: for pickle, and for the `auto_map` of a checkpoint."""
    base = getattr(transformers, name.removeprefix("LowRank"), None) if name.startswith("LowRank") else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return model_class_for(base)
    generated = [model_class for model_class in _model_classes.values() if model_class.__name__ == name]
    if not generated:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return generated[0]
