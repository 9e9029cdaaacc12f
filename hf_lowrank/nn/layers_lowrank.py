"""The layers of low-rank models: what takes the place of a linear layer, a convolution, an embedding, or its tied head.

This file travels with saved checkpoints as remote code: it imports nothing but torch and transformers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRankLayer(nn.Module):
    """What factorized layers of every kind have: a weight [out, in] that is the product of `up` and `down`."""

    form: ClassVar[str] = "factors"  # of `FORMS`, by which `config.forms` names it
    _is_hooked: ClassVar[bool] = (
        True  # for transformers up to 5.18: tensor parallelism wraps the factors, not the layer
    )
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

    @property
    def weight(self) -> Tensor:
        """The weight as the dense layer stores it, for modelling code that reads `layer.weight`.

        Its dtype, device and shape, which is what nearly all of that code asks for, are free; the factors are
        multiplied when its values are used. Writing into it changes nothing.
        """
        if torch.compiler.is_compiling():
            return self._as_stored(self.product())  # the compiler drops a product whose values are not used
        return _UnformedProduct.of(self)

    def product(self) -> Tensor:
        """`up` times `down` [out, in], formed now."""
        up, down = self.matrices()
        return up @ down

    def _as_stored(self, product: Tensor) -> Tensor:
        """A view of the weight [out, in] in the shape in which the dense layer stores it."""
        return product

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

    def _check_factors(self, kind: str, up: Tensor, down: Tensor) -> None:
        found, expected = (up.shape, down.shape), ((self.out_features, self.rank), (self.rank, self.in_features))
        if found != expected:
            raise ValueError(
                f"`up` and `down` have the shapes {list(map(list, found))}; {kind} of {self.in_features} inputs and "
                f"{self.out_features} outputs takes {list(map(list, expected))}"
            )


class LowRankLinear(LowRankLayer):
    """y = up(down(x)): a linear layer whose weight [out, in] is `up.weight` [out, r] times `down.weight` [r, in].

    Both factors are real `nn.Linear`, so that quantizers, adapters and sharding find what they know. The layer itself
    is not one, or they would take it for a dense layer and its two children besides.

    Args:
        in_features: n, of inputs x [..., n].
        out_features: m, of outputs y [..., m].
        rank: r, the width between the factors, from 1 to min(n, m).
        bias: whether `up` has a bias [m].
        device: where the factors are.
        dtype: of the factors.

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
        """An empty layer with the shape, bias, device, dtype and training mode of a linear layer.

        Args:
            module: an nn.Linear, Conv1D or LowRankLinear, which is not changed.
            rank: r, from 1 to min(in, out).
        """
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
        layer._check_factors("a linear layer", up, down)
        weight, bias = _stored_weight(linear), linear.bias
        layer.up.weight = _parameter_like(up, weight)
        layer._set_down(down, weight)
        if isinstance(bias, Tensor):
            layer.up.bias = _parameter_like(bias, bias)
        return layer

    def _set_down(self, down: Tensor, like: Tensor) -> None:
        self.down.weight = _parameter_like(down, like)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def product(self) -> Tensor:
        """`up.weight @ down.weight`, [out, in], formed now."""
        if all(is_plain_linear(factor) for factor in self.linear_factors()):
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
        rows = input.reshape(-1, self.in_features)  # choosing columns of more dimensions takes ten times as long
        output = rows.index_select(1, kept) + self.rest(rows.index_select(1, others))
        return output.reshape(*input.shape[:-1], self.out_features)

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


class LowRankConv(LowRankLayer):
    """up(down(x)): a convolution to r channels and one of kernel size 1, real nn.Conv1d, nn.Conv2d or nn.Conv3d both.

    A convolution is a linear layer on patches: its weight [out, in, *kernel] is seen as a matrix [out, in · k], k being
    the product of the kernel sizes. It is the scheme of Zhang, Zou, He & Sun (2016, "Accelerating Very Deep
    Convolutional Networks for Classification and Detection"), which factorizes over the output channels.

    Args:
        layer: the convolution, or a LowRankConv, that it is to be like.

    Raises:
        ValueError: the convolution is grouped or no plain one, or the rank does not fit it.
    """

    def __init__(self, layer: Any, rank: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        conv = layer.down if isinstance(layer, LowRankConv) else layer  # what has its geometry
        if not isinstance(conv, CONVOLUTIONS) or type(conv) not in CONVOLUTIONS or conv.groups != 1:
            raise ValueError(f"{conv} cannot be factorized: only plain convolutions without groups can")
        self.in_channels, self.out_channels = conv.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups, self.padding_mode = conv.dilation, conv.groups, conv.padding_mode
        self.in_features, self.out_features = math.prod((conv.in_channels, *conv.kernel_size)), layer.out_channels
        self.rank = rank
        self._check_rank("a convolution")
        kind, options = type(conv), {"device": device, "dtype": conv.weight.dtype}
        geometry: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}
        geometry |= {"padding_mode": conv.padding_mode, "bias": False}
        self.down = kind(conv.in_channels, rank, conv.kernel_size, **geometry, **options)  # type: ignore[arg-type]
        self.up = kind(rank, layer.out_channels, 1, bias=layer.bias is not None, **options)  # type: ignore[arg-type]
        self.train(layer.training)

    @classmethod
    def like(cls, module: nn.Module, rank: int) -> LowRankConv:
        """An empty layer with the shape, geometry, bias, device, dtype and training mode of a convolution."""
        return cls(module, rank, _stored_weight(module).device)

    @classmethod
    def from_factors(cls, conv: nn.Module, up: Tensor, down: Tensor) -> LowRankConv:
        """The layer with the weight `up` [out, r] @ `down` [r, in · k] and the bias of a convolution.

        Raises:
            ValueError: factors that do not fit each other or `conv`.
        """
        layer, weight = cls(conv, up.shape[-1], "meta"), _stored_weight(conv)
        layer._check_factors("a convolution", up, down)
        layer.up.weight = _parameter_like(up.reshape(layer.up.weight.shape), weight)
        layer.down.weight = _parameter_like(down.reshape(layer.down.weight.shape), weight)
        if isinstance(bias := conv.bias, Tensor):
            layer.up.bias = _parameter_like(bias, bias)
        return layer

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def matrices(self) -> tuple[Tensor, Tensor]:
        if not all(isinstance(factor, CONVOLUTIONS) for factor in self.linear_factors()):
            raise ValueError("the factors of a convolution are wrapped: merge its adapters before its weight is read")
        return self.up.weight.flatten(1), self.down.weight.flatten(1)

    def _as_stored(self, product: Tensor) -> Tensor:
        return product.unflatten(1, (self.in_channels, *self.kernel_size))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"


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

    def _as_stored(self, product: Tensor) -> Tensor:
        return product.mT  # [tokens, width]

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
    def like(cls, module: Any, rank: int) -> LowRankTiedHead:
        """An empty layer with the shape, bias, device, dtype and training mode of a linear layer."""
        weight, head = _stored_weight(module), cls()
        head.out_features, head.in_features = module.out_features, module.in_features
        head.rank = rank
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        head.down = _SharedLinear(rank, head.in_features, transposed=True, **options)
        head.up = _SharedLinear(rank, head.out_features, **options)
        head.up.bias = module.bias
        return head.train(module.training)

    def untied(self) -> LowRankLinear:
        """The same layer with factors of its own."""
        layer = LowRankLinear(self.in_features, self.out_features, self.rank, self.bias is not None, device="meta")
        up, down = self.matrices()
        layer.up.weight, layer.down.weight = _parameter_like(up, up), _parameter_like(down, up)
        if self.bias is not None:
            layer.up.bias = _parameter_like(self.bias, self.bias)
        return layer.train(self.training)

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
    """The class of layer that takes the place of a module, dense or factorized."""
    if is_convolution(module):
        return LowRankConv
    return LowRankEmbedding if is_embedding(module) else FORMS[form]


def is_embedding(module: nn.Module) -> bool:
    """Whether it looks tokens up, dense or factorized."""
    return isinstance(module, (nn.Embedding, LowRankEmbedding))


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution, dense or factorized."""
    return isinstance(module, (*CONVOLUTIONS, LowRankConv))


class _UnformedProduct(Tensor):
    """Stands for the product of a layer's factors: its dtype, device and shape are free, all else multiplies them."""

    _layer: LowRankLayer
    _is_hf_initialized: bool

    @staticmethod
    def of(layer: LowRankLayer) -> _UnformedProduct:
        # Its memory is that of the factor which a tied layer has too: their pointers say whether they are still tied.
        factor = layer.down.weight if isinstance(layer, LowRankEmbedding) else layer.up.weight
        plain, one = type(factor) is nn.Parameter, (0,) * factor.ndim
        one_element = factor.detach()[one] if plain else torch.empty((), dtype=factor.dtype, device=factor.device)
        shaped = layer._as_stored(one_element.expand(layer.out_features, layer.in_features))
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
    return value._layer._as_stored(value._layer.product()) if isinstance(value, _UnformedProduct) else value


_FREE_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_quantized")
_FREE_METHODS = ("size", "dim", "numel", "is_floating_point", "element_size", "data_ptr", "__len__")
_ANSWERED_WITHOUT_VALUES = {getattr(Tensor, name).__get__ for name in _FREE_ATTRIBUTES} | {
    getattr(Tensor, name) for name in _FREE_METHODS
}


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear that is neither quantized nor wrapped by an adapter."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def _stored_weight(linear: nn.Module) -> Tensor:
    """The weight as the layer stores it: [out, in], [in, out] in Conv1D and nn.Embedding, [out, in, *kernel].

    For a factorized layer one of its factors: its dtype, device and requires_grad are those of the layer.
    """
    if isinstance(linear, LowRankLayer):
        return linear.up.weight
    if not isinstance(linear, (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)):
        raise ValueError(
            f"{type(linear).__name__} is not a linear layer: only nn.Linear, Conv1D, nn.Embedding and nn.Conv1d, "
            "nn.Conv2d and nn.Conv3d can be factorized"
        )
    return linear.weight


def _parameter_like(values: Tensor, like: Tensor) -> nn.Parameter:
    """`values` as a new parameter with the dtype, device and requires_grad of `like`.

    Contiguous, as safetensors stores nothing else and the factors of an SVD are strided.
    """
    copied = values.detach().to(device=like.device, dtype=like.dtype, copy=True)
    return nn.Parameter(copied.contiguous(), requires_grad=like.requires_grad)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer or its factors; [width, tokens] of an embedding, [out, in · k] of a conv.

    Raises:
        ValueError: another kind of module.
    """
    if isinstance(module, LowRankLayer):
        return module.product()
    weight = _stored_weight(module)
    if isinstance(module, CONVOLUTIONS):
        return weight.flatten(1)
    return weight if isinstance(module, nn.Linear) else weight.T


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight [out, in], as `dense_weight` gives it, in the shape in which the dense layer `module` stores its own."""
    if isinstance(module, CONVOLUTIONS):
        return weight.reshape(module.weight.shape)
    return weight if isinstance(module, nn.Linear) else weight.T


def with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """The dense layer `module` with another weight [out, in], as `dense_weight` gives it, in its own dtype."""
    own = _stored_weight(module)
    return with_parameter(module, _parameter_like(as_stored(module, weight), own))


def with_parameter(module: nn.Module, weight: Tensor) -> nn.Module:
    """A module that has all in common with `module` but its parameter `weight`."""
    other = copy.copy(module)
    other._parameters = dict(module._parameters)
    other.weight = weight
    return other


_FACTOR_CLASSES = (nn.Linear, nn.Embedding, _SharedLinear, *CONVOLUTIONS)


@torch.no_grad()
def initialize_factors(layer: LowRankLayer, std: float) -> None:
    """Random factors whose product has entries of standard deviation `std`; loaded factors are left alone."""
    stds = [(std**2 / layer.rank) ** 0.25] * 2  # an entry of the product sums r products of two entries
    if isinstance(layer, InterpolativeLinear):
        stds = [std, layer.rank**-0.5]  # `up` holds columns of the product
    for factor, factor_std in zip(layer.linear_factors(), stds, strict=True):
        weight = getattr(factor, "weight", None)  # none in packed factors
        if not isinstance(factor, _FACTOR_CLASSES) or weight is None or not weight.is_floating_point():
            continue  # quantized: it has been loaded
        if factor.weight.numel():
            init.normal_(factor.weight, std=factor_std)
        if isinstance(bias := getattr(factor, "bias", None), Tensor):
            init.zeros_(bias)
        factor._is_hf_initialized = True  # type: ignore[assignment]
    layer._is_hf_initialized = True  # type: ignore[assignment]
