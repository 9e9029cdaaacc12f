"""Float32 where it is as good as float64, and float64 elsewhere."""

import pytest
import torch
from torch import Tensor

from hf_lowrank.solvers.scaled import Scaled, WhiteningScaling
from hf_lowrank.solvers.single import TOLERANCE, WIDE, distance, excess

RANK = 200


def moment(size: int, falling: float = 1.0, scale: float = 1.0) -> Tensor:
    """Of 4 · size random inputs of falling variances."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(4 * size, size, generator=generator) * (1 + torch.arange(size)) ** (-falling / 2)
    return scale * x.T @ x / len(x)


def objective(shape: tuple[int, int], scale: float = 1.0) -> Scaled:
    return Scaled(
        WhiteningScaling(moment(shape[0], scale=scale), 1e-2), WhiteningScaling(moment(shape[1], scale=scale), 1e-3)
    )


def wide(shape: tuple[int, int], noise: float = 1.0) -> Tensor:
    """A weight of rank 20, and noise."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(shape[0], 20, generator=generator), torch.randn(20, shape[1], generator=generator)
    return up @ down / 4 + noise * torch.randn(shape, generator=generator)


def least(scaled: Scaled, weight: Tensor, rank: int) -> float:
    """The least error of a rank, by a full SVD in float64."""
    left, right = (side.upper for side in (scaled.left, scaled.right))  # type: ignore[attr-defined]
    return float(torch.linalg.svdvals(left @ weight.double() @ right.T)[rank:].square().sum())


@pytest.mark.parametrize("shape", [(WIDE, WIDE + 88), (WIDE + 88, WIDE)])
def test_factors_of_wide_layers_are_the_best_to_the_tolerance_and_found_in_float32(shape: tuple[int, int]) -> None:
    scaled, weight = objective(shape), wide(shape)
    found = scaled.decompose(weight, RANK)
    best = least(scaled, weight, RANK)
    error = float(scaled.error(weight - found.factors(weight, RANK).product()))
    assert abs(error / best - 1) < TOLERANCE
    assert abs(float(found.error(RANK)) / best - 1) < TOLERANCE
    assert abs(float(scaled.spectrum(weight)[RANK:].sum()) / best - 1) < TOLERANCE
    in_double = scaled._eigen(weight.double(), True)[0]
    assert not torch.equal(found.worth, in_double)


@pytest.mark.parametrize(("noise", "scale"), [(1e-4, 1.0), (1.0, 1e25)])
def test_what_float32_cannot_tell_apart_or_hold_is_found_in_float64(noise: float, scale: float) -> None:
    shape = (WIDE, WIDE)
    scaled, weight = objective(shape, scale), wide(shape, noise)
    in_double = scaled._eigen(weight.double(), True)[0]
    assert torch.equal(scaled.decompose(weight, RANK).worth, in_double)
    assert torch.equal(scaled.spectrum(weight), scaled._eigen(weight.double(), False)[0])


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-3])
def test_the_excess_is_about_that_of_a_matrix_with_such_an_error(noise: float) -> None:
    size, rank = 120, 40
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    worth = torch.linspace(1, 0.1, size, dtype=torch.float64) ** 2
    exact = basis @ (worth[:, None] * basis.T)
    change = torch.randn(size, size, generator=generator, dtype=torch.float64) * noise
    other = exact + (change + change.T) / 2**0.5
    values, vectors = torch.linalg.eigh(other)
    error = distance(other.matmul, exact.matmul, other)
    assert 0.7 < error / float((other - exact).norm()) < 1.4
    leading, left = vectors[:, -rank:], worth[rank:].sum()
    lost = float((worth[:rank].sum() - (leading.T @ exact @ leading).trace()) / left)
    misjudged = abs(float(values[:-rank].sum() / left) - 1)
    assert max(lost, misjudged) < 2 * excess(values.flip(0), rank, error) < 50 * max(lost, misjudged)
