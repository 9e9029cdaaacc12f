"""A model → the same model with its linear layers rounded as quantizers round them, computed in float.

What ONNX Runtime's dynamic int8 does to a linear layer, in PyTorch: weights symmetric per output channel, activations
in 8 bits from the least to the largest value of the batch (or of a token). Kernels of x86 CPUs without VNNI add two
products of neighbouring inputs in 16 bits, which saturate: `saturating` does so too.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.solvers.rounding import Grid, round_to_nearest

Change = Callable[[nn.Linear], nn.Module]


def with_linears(model: PreTrainedModel, change: Change) -> PreTrainedModel:
    """A copy of a model whose linear layers, factors among them, are changed one by one; its head too."""
    changed = copy.deepcopy(model)
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not _tied(changed, child):
                setattr(parent, name, change(child))
    return changed


def _tied(model: PreTrainedModel, linear: nn.Linear) -> bool:
    embedding = model.get_input_embeddings()
    return embedding is not None and getattr(embedding, "weight", None) is linear.weight


def rounded_weights(grid: Grid) -> Change:
    """Weights on a grid, each to the nearest value."""

    def change(linear: nn.Linear) -> nn.Module:
        linear.weight.data = round_to_nearest(linear.weight.data.float(), grid).weight()
        return linear

    return change


def stored_as(dtype: torch.dtype) -> Change:
    """Weights in a half precision."""

    def change(linear: nn.Linear) -> nn.Module:
        linear.weight.data = linear.weight.data.to(dtype).float()
        return linear

    return change


def dynamic_int8(per_token: bool = False, saturating: bool = False, weight_bits: int = 8) -> Change:
    """Weights and activations in 8 bits."""
    return lambda linear: DynamicInt8(linear, per_token, saturating, weight_bits)


class DynamicInt8(nn.Module):
    """A linear layer in int8 whose activations get their scale when they are seen."""

    def __init__(self, linear: nn.Linear, per_token: bool, saturating: bool, weight_bits: int) -> None:
        super().__init__()
        rounded = round_to_nearest(linear.weight.data.float(), Grid(weight_bits))
        self.weight, self.bias, self.per_token = rounded.weight(), linear.bias, per_token
        self.codes, self.scales = rounded.codes.float(), rounded.scales[:, 0]
        self.pairs = _pairs_that_can_saturate(self.codes) if saturating else None

    def forward(self, x: Tensor) -> Tensor:
        low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if self.per_token else (x.min(), x.max())
        low, high = low.clamp_max(0), high.clamp_min(0)
        step = (high - low).clamp_min(1e-20) / 255
        zero = (-low / step).round()
        codes = ((x / step).round() + zero).clamp(0, 255)
        output = nn.functional.linear((codes - zero) * step, self.weight, self.bias)
        return output if self.pairs is None else output + self._cut_off(codes) * step * self.scales

    def _cut_off(self, codes: Tensor) -> Tensor:
        """What saturation takes away from products of codes [..., out], as a change of them."""
        rows, columns = self.pairs or (None, None)
        flat = nn.functional.pad(codes.flatten(0, -2), (0, codes.shape[-1] % 2))
        weights = nn.functional.pad(self.codes, (0, self.codes.shape[1] % 2))
        lost = torch.zeros(len(flat), len(self.codes))
        for some, at in zip(rows.split(1 << 14), columns.split(1 << 14), strict=True):
            sums = flat[:, 2 * at] * weights[some, 2 * at] + flat[:, 2 * at + 1] * weights[some, 2 * at + 1]
            lost.index_add_(1, some, sums.clamp(-(2**15), 2**15 - 1) - sums)
        return lost.unflatten(0, codes.shape[:-1])


def _pairs_that_can_saturate(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, pairs) of neighbouring weights of one sign whose products with 255 leave 16 bits."""
    even, odd = nn.functional.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(dim=2)
    found = ((even.sign() * odd.sign() > 0) & ((even + odd).abs() * 255 > 2**15 - 1)).nonzero()
    return found[:, 0], found[:, 1]
