"""What a convolution reads and gives → inputs and output gradients of the linear layer on patches that it is."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def patches(conv: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The input x [batch, in, *spatial] of an ungrouped convolution, and the gradient g [batch, out, *positions].

    Returns [batch, positions, in · k], its last dimension in the order of `weight.flatten(1)`, and [batch, positions,
    out]. Without a batch dimension they are those of a single sample. The patches take k times the memory of x.
    """
    dims = len(conv.kernel_size)
    if x.ndim == dims + 1:
        x, g = x[None], g[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode)  # what the convolution itself does for all other modes
    for axis, (kernel, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    x = x.movedim(1, 1 + dims)  # [batch, *positions, in, *kernel]
    return x.flatten(1 + dims).flatten(1, dims), g.flatten(2).mT


def reading(layer: Any) -> Any:
    """The convolution by which a layer reads its input: itself, or the first factor of one that is factorized."""
    return getattr(layer, "down", layer)


def geometry(conv: Any) -> tuple[Any, ...]:
    """What decides, besides its input, which patches a convolution reads."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode
