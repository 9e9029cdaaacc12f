"""Low-rank models: any transformers model with some of its linear layers replaced by two thinner ones.

A low-rank BERT classifier is a `LowRankBertForSequenceClassification(BertForSequenceClassification)`. The class is
made on demand; building it builds the base model and then swaps in the layers that `config.ranks` names. Under
`from_pretrained` this happens on the meta device, so weights load as in every other model: sharded, in any dtype,
with a device map.

This file travels with saved checkpoints as remote code: it imports nothing but the standard library, torch,
transformers with its huggingface_hub, and the configuration file next to it.
"""

from __future__ import annotations

import copy
import dataclasses
import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from torch import Tensor, nn
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

# For the type checker the mixin is a model; for Python it is not, as transformers inspects the bases of a model class.
if TYPE_CHECKING:
    _ModelBase = PreTrainedModel
else:
    _ModelBase = object


# ---------------------------------------------------------------------------------------------------------------------
# The layers
# ---------------------------------------------------------------------------------------------------------------------


class LowRankLayer(nn.Module):
    """What factorized layers of every kind have: a weight [out, in] that is the product of `up` and `down`."""

    form: ClassVar[str] = "factors"  # of `FORMS`, by which `config.forms` names it
    in_features: int
    out_features: int
    rank: int
    down: Any
    up: Any

    @classmethod
    def like(cls, module: nn.Module, rank: int) -> LowRankLayer:
        """An empty layer with the shape, device, dtype and training mode of `module`.

        Raises:
            ValueError: it is of another kind, or the rank does not fit it.
        """
        raise NotImplementedError

    @classmethod
    def from_factors(cls, module: nn.Module, up: Tensor, down: Tensor) -> LowRankLayer:
        """The layer with the weight `up` [out, r] @ `down` [r, in] in place of `module`."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))

    def product(self) -> Tensor:
        """`up` times `down` [out, in], formed now."""
        up, down = self.matrices()
        return up @ down

    def linear_factors(self) -> tuple[nn.Module, nn.Module]:
        """The two layers that hold the parameters: the one next to the output first."""
        return self.up, self.down

    def num_parameters(self) -> int:
        """Of the two factors, without the bias."""
        return sum(weight.numel() for factor in self.linear_factors() if isinstance(weight := factor.weight, Tensor))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """`up` [out, r] and `down` [r, in]."""
        return self.up.weight, self.down.weight

    def _check_rank(self, kind: str) -> None:
        """Before anything is allocated."""
        most = min(self.in_features, self.out_features)
        if not 1 <= self.rank <= most:
            raise ValueError(
                f"rank {self.rank} for {kind} of {self.in_features} inputs and {self.out_features} outputs: "
                f"it must lie between 1 and {most}"
            )


class LowRankLinear(LowRankLayer):
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
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self._check_rank("a linear layer")
        self.down = self._make_down(in_features, rank, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @staticmethod
    def _make_down(in_features: int, rank: int, **options: Any) -> Any:
        return nn.Linear(in_features, rank, bias=False, **options)

    @classmethod
    def like(cls, module: nn.Module, rank: int) -> LowRankLinear:
        """An empty layer with the shape, bias, device, dtype and training mode of a linear layer."""
        return cls._like(module, rank, _stored_weight(module).device)

    @classmethod
    def _like(cls, linear: nn.Module, rank: int, device: torch.device | str) -> LowRankLinear:
        weight = _stored_weight(linear)
        if isinstance(linear, LowRankLinear):
            out_features, in_features = linear.out_features, linear.in_features
        else:
            out_features, in_features = reversed(weight.shape) if isinstance(linear, Conv1D) else weight.shape
        layer = cls(in_features, out_features, rank, bias=linear.bias is not None, device=device, dtype=weight.dtype)
        return layer.train(linear.training)

    @classmethod
    def from_factors(cls, linear: nn.Module, up: Tensor, down: Tensor) -> LowRankLinear:
        """The layer with the weight `up @ down` and the bias of `linear`, on its device and in its dtype.

        Args:
            linear: the nn.Linear, Conv1D or LowRankLinear to be replaced. It is not changed, and shares no memory.
            up: [out, r].
            down: [r, in].

        Raises:
            ValueError: factors that do not fit each other or `linear`.
        """
        layer = cls._like(linear, up.shape[-1], "meta")  # shapes only: initializing what is overwritten takes time
        found, expected = (up.shape, down.shape), ((layer.out_features, layer.rank), (layer.rank, layer.in_features))
        if found != expected:
            raise ValueError(
                f"`up` and `down` have the shapes {list(map(list, found))}; a linear layer of {layer.in_features} "
                f"inputs and {layer.out_features} outputs takes {list(map(list, expected))}"
            )
        weight, bias = _stored_weight(linear), linear.bias
        layer.up.weight = _parameter_like(up, weight)
        layer._set_down(down, weight)
        if isinstance(bias, Tensor):
            layer.up.bias = _parameter_like(bias, bias)
        return layer

    def _set_down(self, down: Tensor, like: Tensor) -> None:
        self.down.weight = _parameter_like(down, like)

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
        if all(_is_plain(factor) for factor in self.linear_factors()):
            return self.up.weight @ self.down.weight
        # Quantized factors, or factors wrapped by an adapter: what the layer does to the unit vectors.
        like = self.up.weight
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        output = self(torch.eye(self.in_features, device=like.device, dtype=dtype))
        return (output if self.bias is None else output - self.bias).mT

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"


class Interpolation(nn.Module):
    """A projection [r, in] of which r columns are the identity: y = x[kept] + rest(x[others]).

    `order` [in] lists the kept inputs and then the others.
    """

    order: Tensor

    def __init__(
        self,
        in_features: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = rank
        self.register_buffer("order", torch.arange(in_features, dtype=torch.int32, device=device))
        self.rest = nn.Linear(in_features - rank, rank, bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        kept, others = self.order.tensor_split([self.out_features])
        return input.index_select(-1, kept) + self.rest(input.index_select(-1, others))

    @property
    def weight(self) -> Tensor:
        """The projection [r, in], formed now."""
        identity = torch.eye(self.out_features, dtype=self.rest.weight.dtype, device=self.rest.weight.device)
        return torch.cat([identity, self.rest.weight], dim=1).index_select(1, self.order.argsort())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class InterpolativeLinear(LowRankLinear):
    """A LowRankLinear with as few parameters as a matrix of its rank has: r(in + out - r) in place of r(in + out).

    r inputs are taken as they are and the others are expressed by them, which is the interpolative decomposition
    (Cheng, Gimbutas, Martinsson & Rokhlin, 2005). Any two factors can be brought to this form, with the same product.
    """

    form = "interpolative"
    down: Interpolation

    @staticmethod
    def _make_down(in_features: int, rank: int, **options: Any) -> Any:
        return Interpolation(in_features, rank, **options)

    def _set_down(self, down: Tensor, like: Tensor) -> None:
        one = (down == 1) & (down.count_nonzero(dim=0) == 1)  # the columns of the identity
        if not one.any(dim=1).all():
            raise ValueError(f"`down` of an interpolative layer has the identity in {self.rank} of its columns")
        kept = one.int().argmax(dim=1)
        others = torch.ones(self.in_features, dtype=torch.bool, device=down.device).index_fill(0, kept, False)
        order = torch.cat([kept, others.nonzero()[:, 0]])
        self.down.order = order.to(device=like.device, dtype=torch.int32)
        self.down.rest.weight = _parameter_like(down[:, order[self.rank :]], like)

    def linear_factors(self) -> tuple[nn.Module, nn.Module]:
        return self.up, self.down.rest


FORMS: dict[str, type[LowRankLinear]] = {one.form: one for one in (LowRankLinear, InterpolativeLinear)}


class LowRankEmbedding(LowRankLayer):
    """up(down(tokens)): vectors of width r are looked up and then widened.

    The weight [tokens, width] of the embedding is the transpose of the product: seen as a linear layer, its inputs are
    one-hot tokens.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = self.in_features = num_embeddings
        self.embedding_dim = self.out_features = embedding_dim
        self.rank, self.padding_idx = rank, padding_idx
        self._check_rank("an embedding")
        self.down = nn.Embedding(num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.up = _SharedLinear(rank, embedding_dim, device=device, dtype=dtype)

    @classmethod
    def like(cls, module: nn.Module, rank: int) -> LowRankEmbedding:
        """An empty layer with the shape, padding, device, dtype and training mode of an embedding."""
        return cls._like(module, rank, _stored_weight(module).device)

    @classmethod
    def _like(cls, module: Any, rank: int, device: torch.device | str) -> LowRankEmbedding:
        tokens, width = module.weight.shape
        layer = cls(tokens, width, rank, module.padding_idx, device=device, dtype=module.weight.dtype)
        return layer.train(module.training)

    @classmethod
    def from_factors(cls, embedding: nn.Module, up: Tensor, down: Tensor) -> LowRankEmbedding:
        """The layer with the transpose of `up @ down` for a weight: `up` [width, r], `down` [r, tokens]."""
        layer, weight = cls._like(embedding, up.shape[-1], "meta"), _stored_weight(embedding)
        layer.up.weight = _parameter_like(up, weight)
        layer.down.weight = _parameter_like(down.T, weight)
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight [tokens, width], multiplied when its values are used (see `LowRankLinear.weight`)."""
        return self.product().mT if torch.compiler.is_compiling() else _UnformedProduct.of(self)

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.up.weight, self.down.weight.T

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class LowRankTiedHead(LowRankLayer):
    """The output layer of a model whose weight is tied to a factorized embedding: it has the same two factors.

    They are used the other way round, and transposed: `up.weight` [tokens, r] is the embedding's `down.weight`, and
    `down.weight` [width, r] its `up.weight`.
    """

    @classmethod
    def like(cls, module: nn.Module, rank: int) -> LowRankTiedHead:
        """An empty layer with the shape, bias, device, dtype and training mode of a linear layer."""
        weight, head = _stored_weight(module), cls()
        head.out_features, head.in_features = weight.shape
        head.rank = rank
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        head.down = _SharedLinear(rank, head.in_features, transposed=True, **options)
        head.up = _SharedLinear(rank, head.out_features, **options)
        head.up.bias = module.bias
        return head.train(module.training)

    @property
    def weight(self) -> Tensor:
        """The weight [tokens, width], multiplied when its values are used (see `LowRankLinear.weight`)."""
        return self.product() if torch.compiler.is_compiling() else _UnformedProduct.of(self)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.up.weight, self.down.weight.T


class _SharedLinear(nn.Module):
    """y = x @ weight.T + bias, or x @ weight where transposed: a factor that an embedding may share with a head.

    No nn.Linear, as adapters and quantizers would take it for a layer of its own and change what is tied to it.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, transposed: bool = False, **options: Any) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.register_parameter("bias", None)
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.mT if self.transposed else self.weight, self.bias)


def layer_class_for(module: nn.Module, form: str = LowRankLinear.form) -> type[LowRankLayer]:
    """The class of layer that takes the place of a module."""
    return LowRankEmbedding if isinstance(module, nn.Embedding) else FORMS[form]


class _UnformedProduct(Tensor):
    """Stands for the product of a layer's factors: its dtype, device and shape are free, all else multiplies them."""

    _layer: LowRankLayer
    _is_hf_initialized: bool

    @staticmethod
    def of(layer: LowRankLayer) -> _UnformedProduct:
        # Its memory is that of the factor which a tied layer has too: their pointers say whether they are still tied.
        factor = layer.down.weight if isinstance(layer, LowRankEmbedding) else layer.up.weight
        plain = type(factor) is nn.Parameter
        one_element = factor.detach()[0, 0] if plain else torch.empty((), dtype=factor.dtype, device=factor.device)
        shaped = one_element.expand(layer.out_features, layer.in_features)
        if isinstance(layer, LowRankEmbedding):
            shaped = shaped.mT  # as an embedding stores it
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
    if not isinstance(value, _UnformedProduct):
        return value
    product = value._layer.product()
    return product.mT if isinstance(value._layer, LowRankEmbedding) else product


_FREE_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_quantized")
_FREE_METHODS = ("size", "dim", "numel", "is_floating_point", "element_size", "data_ptr", "__len__")
_ANSWERED_WITHOUT_VALUES = {getattr(Tensor, name).__get__ for name in _FREE_ATTRIBUTES} | {
    getattr(Tensor, name) for name in _FREE_METHODS
}


def _is_plain(factor: nn.Module) -> bool:
    return type(factor) is nn.Linear and type(factor.weight) is nn.Parameter and factor.weight.is_floating_point()


def _stored_weight(linear: nn.Module) -> Tensor:
    """The weight as the layer stores it, [out, in] in nn.Linear and [in, out] in Conv1D and nn.Embedding.

    For a LowRankLinear one of its factors: its dtype, device and requires_grad are those of the layer.
    """
    if isinstance(linear, LowRankLinear):
        return linear.up.weight
    if not isinstance(linear, (nn.Linear, Conv1D, nn.Embedding)):
        raise ValueError(
            f"{type(linear).__name__} is not a linear layer: only nn.Linear, Conv1D and nn.Embedding can be factorized"
        )
    return linear.weight


def _parameter_like(values: Tensor, like: Tensor) -> nn.Parameter:
    """`values` as a new parameter with the dtype, device and requires_grad of `like`.

    Contiguous, as safetensors stores nothing else and the factors of an SVD are strided.
    """
    copied = values.detach().to(device=like.device, dtype=like.dtype, copy=True)
    return nn.Parameter(copied.contiguous(), requires_grad=like.requires_grad)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer or its factors; an embedding's is [width, tokens].

    Raises:
        ValueError: another kind of module.
    """
    if isinstance(module, LowRankLayer):
        return module.product()
    weight = _stored_weight(module)
    return weight if isinstance(module, nn.Linear) else weight.T


# ---------------------------------------------------------------------------------------------------------------------
# Editing a model
# ---------------------------------------------------------------------------------------------------------------------


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module called `name`, under every name it is reached by (a shared module stays shared).

    With an embedding, the layers whose weight is tied to its weight are replaced, and tied to its factors.

    `config.ranks` and `config.forms` of a low-rank model are kept up to date.

    Raises:
        ValueError: there is no such module, or its weight is tied to another one (the tie would be lost).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise ValueError(f"{type(model).__name__} has no module called {name!r}")
    if isinstance(new, LowRankEmbedding):
        _replace_embedding(model, name, new)
    else:
        _refuse_tied(model, name)
        _replace_by_identity(model, {modules[name]: new})
    if isinstance(model, LowRankMixin):
        model._describe_layers()


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
    _replace_by_identity(model, replacements)
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
    forms: dict[str, str]  # of those that are no plain factors
    absent: tuple[str, ...]  # names, as saved, of modules of the shared body that this model does not have
    renamed: bool  # another version of transformers saved the checkpoint, and called some modules otherwise


def _match_ranks(model: PreTrainedModel, saved_ranks: Mapping[str, int], saved_forms: Mapping[str, str]) -> _RankMatch:
    """Find the modules that `saved_ranks` names: the same ones, with or without the prefix of the model's body.

    Raises:
        ValueError: the same model class was saved, and it has no module of that name.
    """
    here = {name for name, _ in model.named_modules(remove_duplicate=False)}
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
    _replace_by_identity(model, replacements)


def _split_parallel_plan(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """Rewrite the tensor-parallel plan for the factors.

    A column-parallel layer shards the rows of `up`, a row-parallel one the columns of `down`: the sum over the devices
    is then one of activations of width r.
    """
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
    return next((name for name in candidates if _is_dense(_submodule(model, name) or nn.Identity())), None)


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

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the ranks and the source files that loading needs.

        The source files come first, config.json next and the weights last, so that a save which breaks off leaves a
        folder that fails to load, not one that loads as something else.
        """
        self._describe_layers()
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
        # Some base classes' `_init_weights` writes to the bias of every nn.Linear, and `down` has none.
        for module in self.modules():
            if isinstance(module, LowRankLayer):
                _initialize_factors(module, std=getattr(self.config, "initializer_range", None) or 0.02)
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


_FACTOR_CLASSES = (nn.Linear, nn.Embedding, _SharedLinear)


@torch.no_grad()
def _initialize_factors(layer: LowRankLayer, std: float) -> None:
    """Random factors whose product has entries of standard deviation `std`; loaded factors are left alone."""
    stds = [(std**2 / layer.rank) ** 0.25] * 2  # an entry of the product sums r products of two entries
    if isinstance(layer, InterpolativeLinear):
        stds = [std, layer.rank**-0.5]  # `up` holds columns of the product
    for factor, factor_std in zip(layer.linear_factors(), stds, strict=True):
        if not isinstance(factor, _FACTOR_CLASSES) or not factor.weight.is_floating_point():
            continue  # quantized: it has been loaded
        if factor.weight.numel():
            init.normal_(factor.weight, std=factor_std)
        if isinstance(bias := getattr(factor, "bias", None), Tensor):
            init.zeros_(bias)
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

A {model.base_model_class.__name__} with {len(model.lowrank_ranks)} of its linear layers factorized to low rank.
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
