"""The benchmark of the gauge rounds as int8 kernels do: sums of whole numbers, one pair of inputs at a time."""

import pytest
import torch
from torch import nn

from benchmarks.fake_quantization import DynamicInt8


@pytest.mark.parametrize("saturating", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_dynamic_int8_is_integer_arithmetic(per_token: bool, saturating: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).requires_grad_(False)
    linear.weight.data.abs_().add_(0.3)  # large weights of one sign: pairs saturate
    x = 3 * torch.rand(2, 3, 7)
    layer = DynamicInt8(linear, per_token, saturating, 8)
    low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if per_token else (x.min(), x.max())
    step = (high - low.clamp_max(0)) / 255
    zero = (-low.clamp_max(0) / step).round()
    codes, weights = (x / step).round() + zero, layer.codes
    padded, others = nn.functional.pad(codes, (0, 1)), nn.functional.pad(weights, (0, 1))
    products = (padded[..., None, :] * others).unflatten(-1, (-1, 2)).sum(dim=-1)
    sums = (products.clamp(-32768, 32767) if saturating else products).sum(dim=-1)
    expected = (sums - zero * weights.sum(dim=1)) * step * layer.scales + linear.bias
    torch.testing.assert_close(layer(x), expected)
    assert (products > 32767).any()
