"""Low-rank models: any transformers model with some of its linear layers replaced by two thinner ones.

A low-rank BERT classifier is a `LowRankBertForSequenceClassification(BertForSequenceClassification)`. The class is
made on demand; building it builds the base model and then swaps in the layers that `config.ranks` names. Under
`from_pretrained` this happens on the meta device, so weights load as in every other model: sharded, in any dtype,
with a device map.

This file travels with saved checkpoints as remote code: it imports nothing but the standard library, torch,
transformers and the configuration file next to it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
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

from .configuration_lowrank import (
    MODEL_TYPE,
    LowRankConfig,
    LowRankConfigMixin,
    config_class_for,
    on_config_class_created,
)

# For the type checker the mixin is a model; for Python it is not, as transformers inspects the bases of a model class.
if TYPE_CHECKING:
    _ModelBase = PreTrainedModel
else:
    _ModelBase = object


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


class LowRankLinear(nn.Module):
    """y = up(down(x)): a linear layer whose weight [out, in] is `up.weight` [out, r] times `down.weight` [r, in].

    Both factors are real `nn.Linear`, so that quantizers, adapters and sharding find what they know. The layer itself
    is not one, or they would take it for a dense layer and its two children besides.

    Raises:
        ValueError: a rank below 1 or above min(in_features, out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank {rank} for a linear layer of {in_features} inputs and {out_features} outputs: "
                f"it must lie between 1 and {min(in_features, out_features)}"
            )
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def like(cls, linear: nn.Module, rank: int) -> LowRankLinear:
        """An empty layer with the shape, bias, device, dtype and training mode of `linear`.

        Raises:
            ValueError: `linear` is no linear layer, or the rank does not fit it.
        """
        return cls._like(linear, rank, _stored_weight(linear).device)

    @classmethod
    def _like(cls, linear: nn.Module, rank: int, device: torch.device | str) -> LowRankLinear:
        weight = _stored_weight(linear)
        out_features, in_features = reversed(weight.shape) if isinstance(linear, Conv1D) else weight.shape
        layer = cls(in_features, out_features, rank, bias=linear.bias is not None, device=device, dtype=weight.dtype)
        return layer.train(linear.training)

    @classmethod
    def from_factors(cls, linear: nn.Module, up: Tensor, down: Tensor) -> LowRankLinear:
        """The layer with the weight `up @ down` and the bias of `linear`, on its device and in its dtype.

        Args:
            linear: the nn.Linear or Conv1D that is to be replaced. It is not changed, and shares no memory.
            up: [out, r].
            down: [r, in].

        Raises:
            ValueError: factors that do not fit each other or `linear`.
        """
        layer = cls._like(linear, up.shape[-1], "meta")  # shapes only: initializing what is overwritten takes time
        found, expected = (up.shape, down.shape), (layer.up.weight.shape, layer.down.weight.shape)
        if found != expected:
            raise ValueError(
                f"`up` and `down` have the shapes {list(map(list, found))}; a linear layer of {layer.in_features} "
                f"inputs and {layer.out_features} outputs takes {list(map(list, expected))}"
            )
        weight, bias = _stored_weight(linear), linear.bias
        layer.up.weight = _parameter_like(up, weight)
        layer.down.weight = _parameter_like(down, weight)
        if isinstance(bias, Tensor):
            layer.up.bias = _parameter_like(bias, bias)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], for modelling code that reads `linear.weight`.

        Its dtype, device and shape, which is what nearly all of that code asks for, are free; the factors are
        multiplied when its values are used. Writing into it changes nothing.
        """
        if torch.compiler.is_compiling():
            return self.product()  # the compiler drops a product whose values are not used
        return _UnformedProduct.of(self)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def product(self) -> Tensor:
        """`up.weight @ down.weight`, [out, in], formed now."""
        if _is_plain(self.up) and _is_plain(self.down):
            return self.up.weight @ self.down.weight
        # Quantized factors, or factors wrapped by an adapter: what the layer does to the unit vectors.
        like = self.up.weight
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        output = self(torch.eye(self.in_features, device=like.device, dtype=dtype))
        return (output if self.bias is None else output - self.bias).mT

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"


class _UnformedProduct(Tensor):
    """Stands for the product of a layer's factors: its dtype, device and shape are free, all else multiplies them."""

    _layer: LowRankLinear
    _is_hf_initialized: bool

    @staticmethod
    def of(layer: LowRankLinear) -> _UnformedProduct:
        factor = layer.up.weight
        one_element = torch.empty((), dtype=factor.dtype, device=factor.device)
        shaped = one_element.expand(layer.out_features, layer.in_features)
        unformed: _UnformedProduct = Tensor._make_subclass(_UnformedProduct, shaped)
        unformed._layer = layer
        unformed._is_hf_initialized = True  # keeps transformers' initialization off it: the factors are the parameters
        return unformed

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERED_WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = torch.utils._pytree.tree_map(_formed, (args, kwargs))
        return func(*args, **kwargs)


def _formed(value: Any) -> Any:
    return value._layer.product() if isinstance(value, _UnformedProduct) else value


_FREE_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_quantized")
_FREE_METHODS = ("size", "dim", "numel", "is_floating_point", "element_size", "__len__")
_ANSWERED_WITHOUT_VALUES = {getattr(Tensor, name).__get__ for name in _FREE_ATTRIBUTES} | {
    getattr(Tensor, name) for name in _FREE_METHODS
}


def _is_plain(factor: nn.Module) -> bool:
    return type(factor) is nn.Linear and type(factor.weight) is nn.Parameter and factor.weight.is_floating_point()


def _stored_weight(linear: nn.Module) -> Tensor:
    """The weight as the layer stores it, [out, in] in nn.Linear and [in, out] in Conv1D."""
    if not isinstance(linear, (nn.Linear, Conv1D)):
        raise ValueError(f"{type(linear).__name__} is not a linear layer: only nn.Linear and Conv1D can be factorized")
    return linear.weight


def _parameter_like(values: Tensor, like: Tensor) -> nn.Parameter:
    """`values` as a new parameter with the dtype, device and requires_grad of `like`.

    Contiguous, as safetensors stores nothing else and the factors of an SVD are strided.
    """
    copied = values.detach().to(device=like.device, dtype=like.dtype, copy=True)
    return nn.Parameter(copied.contiguous(), requires_grad=like.requires_grad)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] of an nn.Linear (itself), a Conv1D (its transpose) or a LowRankLinear (the product).

    Raises:
        ValueError: another kind of module.
    """
    if isinstance(module, LowRankLinear):
        return module.product()
    weight = _stored_weight(module)
    return weight.T if isinstance(module, Conv1D) else weight


# ---------------------------------------------------------------------------------------------------------------------
# Editing a model
# ---------------------------------------------------------------------------------------------------------------------


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module called `name`, under every name it is reached by (a shared module stays shared).

    `config.ranks` of a low-rank model is kept up to date.

    Raises:
        ValueError: there is no such module, or its weight is tied to another one (the tie would be lost).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise ValueError(f"{type(model).__name__} has no module called {name!r}")
    _refuse_tied(model, name)
    _replace_by_identity(model, {modules[name]: new})
    if isinstance(model, LowRankMixin):
        model.config.ranks = model.lowrank_ranks


def _refuse_tied(model: nn.Module, name: str) -> None:
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for one, other in ties.items():
        if f"{name}.weight" in (one, other):
            raise ValueError(f"{name} cannot be replaced: its weight is tied ({one} is {other})")


def _replace_by_identity(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
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
    absent: tuple[str, ...]  # names, as saved, of modules of the shared body that this model does not have
    renamed: bool  # another version of transformers saved the checkpoint, and called some modules otherwise


def _match_ranks(model: PreTrainedModel, saved_ranks: Mapping[str, int]) -> _RankMatch:
    """Find the modules that `saved_ranks` names: the same ones, with or without the prefix of the model's body.

    Raises:
        ValueError: the same model class was saved, and it has no module of that name.
    """
    here = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    ranks: dict[str, int] = {}
    unmatched: dict[str, int] = {}
    for name, rank in saved_ranks.items():
        candidates = (name, name.removeprefix(prefix), prefix + name)
        found = next((candidate for candidate in candidates if candidate in here), None)
        (unmatched if found is None else ranks)[found or name] = rank
    renamed = _todays_names(model, unmatched) if unmatched else {}
    ranks.update({renamed[name]: rank for name, rank in unmatched.items() if renamed[name] in here})
    absent = [name for name in unmatched if renamed[name] not in here]
    if absent and getattr(model.config, "architectures", None) == [type(model).__name__]:
        raise ValueError(
            f"`config.ranks` names {absent[0]!r}, which {type(model).__name__} of transformers "
            f"{transformers.__version__} does not have: correct the config, or use the transformers version that the "
            "checkpoint was saved with"
        )
    return _RankMatch(
        ranks=ranks,
        absent=tuple(name for name in absent if name.startswith(prefix)),
        renamed=len(absent) < len(unmatched),
    )


def _todays_names(model: PreTrainedModel, names: Mapping[str, int]) -> dict[str, str]:
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


def _swap_in_empty_layers(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """Replace every module of `ranks` by an empty LowRankLinear, under every name it is reached by.

    Raises:
        ValueError: a module that is not linear or is tied, or a rank that does not fit it.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for name, rank in ranks.items():
        module = model.get_submodule(name)
        if isinstance(module, LowRankLinear):
            continue  # heads that build their body with AutoModel.from_config get a body which is low-rank already
        _refuse_tied(model, name)
        try:
            replacements[module] = LowRankLinear.like(module, rank)
        except ValueError as error:
            raise ValueError(f"`config.ranks` does not fit the model: {name}: {error}") from error
    _replace_by_identity(model, replacements)


def _split_parallel_plan(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """Rewrite the tensor-parallel plan for the factors.

    A column-parallel layer shards the rows of `up`, a row-parallel one the columns of `down`: the sum over the devices
    is then one of activations of width r.
    """
    plan: dict[str, str] | None = getattr(model, "_tp_plan", None)
    if not plan:
        return
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in ranks}
    for pattern in patterns & plan.keys():
        style = plan[pattern]
        plan[f"{pattern}.{'down' if style.startswith('rowwise') else 'up'}"] = style
    dense = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, module in model.named_modules() if _is_dense(module)}
    for pattern in patterns & plan.keys() - dense:
        del plan[pattern]


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


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
    for key in sorted(info.missing_keys):
        if (name := _factorized_layer_of(model, key)) is not None and not _is_loaded(model, key):
            raise ValueError(
                f"{name} has rank {model.get_submodule(name).rank} in config.json, but the checkpoint lacks {key}, of "
                f"shape {list(model.get_parameter(key).shape)}: {_REMEDY}"
            )
    for key in sorted(info.unexpected_keys):
        if (name := _dense_layer_of_factor(model, key)) is not None:
            raise ValueError(
                f"The checkpoint holds a factor {key}, but `ranks` in config.json does not name {name}, which would "
                f"get random weights: {_REMEDY}"
            )
    _refuse_renamed_layers(model, info)


_REMEDY = "config.json and the weights are of different models, save or download the folder again"


def _factorized_layer_of(model: nn.Module, key: str) -> str | None:
    """The name of the LowRankLinear that the parameter `key` belongs to, if it does."""
    name = key.rpartition(".")[0].rpartition(".")[0]
    return name if name and isinstance(_submodule(model, name), LowRankLinear) else None


def _dense_layer_of_factor(model: PreTrainedModel, key: str) -> str | None:
    """The name of the dense layer that stands where the checkpoint has the factor `key`, if one does."""
    match = re.fullmatch(r"(.+)\.(?:up|down)\.weight", key)
    if match is None:
        return None
    prefix = f"{model.base_model_prefix}."
    candidates = (match[1], match[1].removeprefix(prefix), prefix + match[1])
    return next((name for name in candidates if _is_dense(_submodule(model, name) or nn.Identity())), None)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_loaded(model: nn.Module, key: str) -> bool:
    """Whether a parameter has its values, under another name of the module it belongs to."""
    return getattr(model.get_parameter(key), "_is_hf_initialized", False)


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


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


class LowRankMixin(_ModelBase):
    """Mixed in front of a transformers model class: builds it, then swaps in the layers that `config.ranks` names."""

    base_model_class: ClassVar[type[PreTrainedModel]]
    _rank_match: _RankMatch | None = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # `config.ranks` stays as it is: a head may hand the same config to the Auto class that builds its body.
        self._rank_match = _match_ranks(self, config.ranks)
        _swap_in_empty_layers(self, self._rank_match.ranks)
        _split_parallel_plan(self, self._rank_match.ranks)
        self.init_weights()  # of the new layers; the rest is initialized, and on the meta device nothing happens

    @property
    def lowrank_ranks(self) -> dict[str, int]:
        """{name: rank} of every factorized layer."""
        return {name: module.rank for name, module in self.named_modules() if isinstance(module, LowRankLinear)}

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the ranks and the source files that loading needs.

        The source files come first, config.json next and the weights last, so that a save which breaks off leaves a
        folder that fails to load, not one that loads as something else.
        """
        self.config.ranks = self.lowrank_ranks
        self.config.auto_map = _auto_map(type(self), self.config)
        # The base architecture's conversions are for dense weights, and some would take factors for them.
        kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, *args, **kwargs)

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
        # Some base classes' `_init_weights` writes to the bias of every nn.Linear, and `down` has none.
        for module in self.modules():
            if isinstance(module, LowRankLinear):
                _initialize_factors(module, std=getattr(self.config, "initializer_range", None) or 0.02)
        super().initialize_weights()

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


@torch.no_grad()
def _initialize_factors(layer: LowRankLinear, std: float) -> None:
    """Random factors whose product has entries of standard deviation `std`; loaded factors are left alone."""
    factor_std = (std**2 / layer.rank) ** 0.25  # an entry of the product sums r products of two entries
    for factor in (layer.up, layer.down):
        if not isinstance(factor, nn.Linear) or not factor.weight.is_floating_point():
            continue  # quantized: it has been loaded
        init.normal_(factor.weight, std=factor_std)
        if factor.bias is not None:
            init.zeros_(factor.bias)
        factor._is_hf_initialized = True  # type: ignore[assignment]
    layer._is_hf_initialized = True  # type: ignore[assignment]


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
    config.ranks = {}
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
