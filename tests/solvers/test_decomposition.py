"""A weight decomposed once against theory: the best factors of every rank, what they leave out, and their channels."""

import pytest
import torch

from hf_lowrank.solvers.elementwise import RotatedScaling
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import Channels, balanced_basis, flat_basis, in_basis, random_rotation
from hf_lowrank.solvers.scaled import DiagonalScaling, Scaled, Scaling, WhiteningScaling, whitening

SHORT, LONG, MOST = 24, 40, 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def moment_of(size: int) -> torch.Tensor:
    rows = torch.randn(4 * size, size, dtype=torch.float64) * torch.randn(size).exp()
    return rows.T @ rows / len(rows)


def sides(kind: str, out_features: int, in_features: int) -> Scaled:
    if kind == "plain":
        return Scaled(Scaling(), Scaling())
    if kind == "diagonal":
        return Scaled(DiagonalScaling(torch.rand(out_features)), DiagonalScaling(torch.rand(in_features)))
    left = RotatedScaling(DiagonalScaling(torch.rand(out_features) + 0.1), random_rotation(out_features))
    return Scaled(
        left if kind == "rotated" else whitening(moment_of(out_features), 1e-2),
        whitening(moment_of(in_features), 1e-3),
    )


@pytest.mark.parametrize("shape", [(SHORT, LONG), (LONG, SHORT), (SHORT, SHORT)])
@pytest.mark.parametrize("kind", ["plain", "diagonal", "whitened", "rotated"])
def test_factors_of_every_rank_are_the_best_and_the_rest_of_the_worth_is_their_error(
    kind: str, shape: tuple[int, int]
) -> None:
    scaled, weight = sides(kind, *shape), torch.randn(shape)
    found = scaled.decompose(weight, MOST)
    torch.testing.assert_close(found.worth, scaled.spectrum(weight))
    torch.testing.assert_close(found.error(0), scaled.error(weight))
    torch.testing.assert_close(found.mass(shape), scaled.mass(shape))
    for rank in (1, 7, MOST):
        product = found.factors(weight, rank).product()
        torch.testing.assert_close(product, scaled.factorize(weight, rank).product(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scaled.error(weight - product), found.error(rank), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(SHORT, LONG), (LONG, SHORT)])
@pytest.mark.parametrize("kind", ["plain", "diagonal", "whitened", "rotated"])
def test_what_its_channels_carry_is_known_without_the_moments(kind: str, shape: tuple[int, int]) -> None:
    scaled, weight, mean = sides(kind, *shape), torch.randn(shape), torch.randn(shape[1], dtype=torch.float64)
    found = scaled.decompose(weight, MOST)
    first = found.factors(weight, MOST)
    assert_same_channels(Channels.ordered(first, found, None), Channels.of(first, scaled))
    moment = scaled.right.square(torch.eye(shape[1], dtype=torch.float64))
    about = Scaled(scaled.left, WhiteningScaling(moment + mean.outer(mean), 0.0))
    assert_same_channels(Channels.ordered(first, found, mean), Channels.of(first, about))


def assert_same_channels(found: Channels, expected: Channels) -> None:
    for name, moment in vars(expected).items():
        assert torch.dist(getattr(found, name), moment) < 1e-5 * moment.norm(), name


@pytest.mark.parametrize("gauge", ["flat", "balanced"])
@pytest.mark.parametrize("broken", ["", "zero", "deficient"])
def test_a_basis_and_its_inverse_leave_the_product(gauge: str, broken: str) -> None:
    weight = torch.randn(SHORT, 5) @ torch.randn(5, LONG) if broken == "deficient" else torch.randn(SHORT, LONG)
    weight = weight * (broken != "zero")
    found = sides("whitened", SHORT, LONG).decompose(weight, MOST)
    first = found.factors(weight, MOST)
    basis = flat_basis(Channels.ordered(first, found, None)) if gauge == "flat" else balanced_basis(first)
    factors, (forth, back) = in_basis(first, basis)
    torch.testing.assert_close(forth @ back, torch.eye(MOST, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(factors.product(), first.product(), rtol=1e-6, atol=1e-6)
    if gauge == "balanced" and not broken:
        expected = Factors(first.up, first.down).balanced()
        torch.testing.assert_close(factors.up.norm(dim=0), expected.up.norm(dim=0))
        torch.testing.assert_close(factors.down.norm(dim=1), expected.down.norm(dim=1))


def test_what_is_worth_nothing_is_no_trouble() -> None:
    found = sides("whitened", SHORT, LONG).decompose(torch.zeros(SHORT, LONG), 4)
    assert float(found.error(0)) == 0
    assert torch.isfinite(found.factors(torch.zeros(SHORT, LONG), 4).up).all()


def test_a_moment_that_rounding_left_indefinite_is_regressed_on_as_one_that_is_damped_more() -> None:
    """A centred moment of inputs that hardly differ is a difference of two large numbers, of either sign."""
    inverse = WhiteningScaling(torch.diag(torch.tensor([1.0, -0.4])), 0.0).regress(torch.eye(2), 0.02).diagonal()
    assert (inverse > 0).all()
    assert inverse[0] < inverse[1]
