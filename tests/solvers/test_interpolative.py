"""Columns of maximal volume: what is kept expresses all the rest with small coefficients."""

import pytest
import torch

from hf_lowrank.solvers.interpolative import LARGEST_COEFFICIENT, columns_of_maximal_volume


@pytest.mark.parametrize("exchanges", [0, 1000])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_what_is_kept_expresses_the_rest_with_small_coefficients(rank: int, exchanges: int) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, rank, dtype=torch.float64)).Q
    kept = columns_of_maximal_volume(basis, exchanges)
    assert len(set(kept.tolist())) == rank
    coefficients = torch.linalg.solve(basis[kept].T, basis.T)
    largest = LARGEST_COEFFICIENT if exchanges else 2.0**rank  # partial pivoting alone bounds them by that
    assert coefficients.abs().max() <= largest + 1e-9
