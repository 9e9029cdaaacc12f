"""A factorized layer → the dense layer that it was made from, with the product of the factors as weight."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import LowRankError
from hf_lowrank.nn.layers_lowrank import CONVOLUTIONS, LowRankConv, LowRankLayer, LowRankLinear, as_stored


def dense_layer(layer: LowRankLayer, like: nn.Module) -> nn.Module:
    """The product of the factors as a layer of the kind of `like`, which may lie on the meta device."""
    with torch.no_grad():
        up, down = layer.matrices()
        weight = (up.float() @ down.float()).to(up.dtype)
    bias = getattr(layer, "bias", None)
    with torch.device("meta"):
        if isinstance(like, nn.Embedding):
            dense: nn.Module = nn.Embedding(layer.in_features, layer.out_features, like.padding_idx)
        elif isinstance(like, CONVOLUTIONS):
            dense = copy.deepcopy(like)
        elif isinstance(like, Conv1D):
            dense = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    dense.weight = nn.Parameter(as_stored(like, weight).contiguous(), requires_grad=up.requires_grad)
    if bias is not None:
        dense.bias = bias
    return dense.train(layer.training)


def refuse_wrapped_factors(model: nn.Module) -> None:
    """Raise where a factor is no plain layer, so that it cannot be multiplied out.

    Raises:
        LowRankError: the message names the layer.
    """
    factor: Any
    for name, layer in model.named_modules():
        if isinstance(layer, (LowRankLinear, LowRankConv)):
            for factor in layer.linear_factors():
                if type(factor) not in (nn.Linear, *CONVOLUTIONS) or not factor.weight.is_floating_point():
                    raise LowRankError(
                        f"{name} has a factor of the kind {type(factor).__name__}, quantized or wrapped: densify a "
                        "model before quantizing it, and after merging its adapters"
                    )
