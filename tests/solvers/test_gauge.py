"""The gauge against theory: the product stays, the cost is the least there is, and every channel carries the same."""

import pytest
import torch

from hf_lowrank.solvers import GAUGES, METHODS
from hf_lowrank.solvers.elementwise import ElementWise, Rotated
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.family import GAUGE_NAMES
from hf_lowrank.solvers.gauge import (
    Channels,
    balanced,
    equalizing,
    flat,
    least_rounding,
    mean_metric,
    power,
    random_rotation,
)
from hf_lowrank.solvers.scaled import DiagonalScaling, Scaled, Scaling, whitening

OUT, IN, RANK = 40, 56, 12
PLAIN = Scaled(Scaling(), Scaling())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def moment_of(size: int) -> torch.Tensor:
    """With a falling spectrum, as that of hidden states."""
    rows = torch.randn(4 * size, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    rows = rows * torch.randn(size).exp()
    return rows.T @ rows / len(rows)


def sides() -> Scaled:
    return Scaled(whitening(moment_of(OUT), 1e-2), whitening(moment_of(IN), 1e-3))


def factors_of(scaled: Scaled, rank: int = RANK) -> Factors:
    return scaled.factorize(torch.randn(OUT, IN), rank)


def test_the_names_are_those_of_the_registry() -> None:
    assert tuple(GAUGES) == GAUGE_NAMES


@pytest.mark.parametrize("rank", [1, 2, 12, 40])
@pytest.mark.parametrize("name", GAUGE_NAMES)
def test_the_product_stays(name: str, rank: int) -> None:
    scaled = sides()
    factors = factors_of(scaled, rank)
    chosen = GAUGES[name](factors, scaled)
    torch.testing.assert_close(chosen.product(), factors.product(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chosen.up.norm(), chosen.down.norm())


def test_the_scale_of_either_factor_does_not_matter() -> None:
    scaled = sides()
    factors = factors_of(scaled)
    other = flat(Factors(1e6 * factors.up, 1e-6 * factors.down), scaled)
    torch.testing.assert_close(other.up, flat(factors, scaled).up, rtol=1e-5, atol=1e-6)


def test_every_channel_carries_the_same() -> None:
    scaled = sides()
    variances = Channels.of(flat(factors_of(scaled), scaled), scaled).inputs.diagonal()
    torch.testing.assert_close(variances, variances.mean().expand(RANK), rtol=1e-5, atol=0.0)
    before = Channels.of(balanced(factors_of(scaled), scaled), scaled).inputs.diagonal()
    assert before.max() > 3 * before.mean()


def test_for_activations_alone_the_two_moments_are_equal_and_the_cost_is_the_bound() -> None:
    scaled = sides()
    channels = Channels.of(factors_of(scaled), scaled)
    there = channels.in_basis(power(mean_metric(channels.outputs, channels.inputs), 0.5))
    torch.testing.assert_close(there.inputs, there.outputs)
    root = power(channels.inputs, 0.5)
    bound = power(root @ channels.outputs @ root, 0.5).trace().square()
    torch.testing.assert_close(there.inputs.trace() * there.outputs.trace(), bound)


def test_the_moments_of_a_basis_are_those_of_its_factors() -> None:
    scaled, basis = sides(), torch.randn(RANK, RANK, dtype=torch.float64)
    factors = factors_of(scaled)
    turned = Factors(factors.up @ basis, torch.linalg.solve(basis, factors.down))
    expected, found = Channels.of(turned, scaled), Channels.of(factors, scaled).in_basis(basis)
    for name in ("inputs", "outputs", "down", "up"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_no_other_basis_costs_less() -> None:
    scaled = sides()
    channels = Channels.of(factors_of(scaled), scaled)
    metric = least_rounding(channels)
    least = channels.in_basis(power(metric, 0.5)).cost()
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            step = torch.randn(RANK, RANK, dtype=torch.float64) * scale
            basis = power(metric, 0.5) @ torch.linalg.matrix_exp(step)
            assert channels.in_basis(basis).cost() >= least * (1 - 1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].iterates])
def test_flat_never_costs_more_than_balanced(name: str) -> None:
    statistics = {
        "activation_moment": moment_of(IN),
        "gradient_moment": moment_of(OUT),
        "kronecker_in": moment_of(IN),
        "kronecker_out": moment_of(OUT),
        "active_tokens": torch.tensor(3.0),
        "activation_magnitude": torch.rand(IN),
        "fisher_rows": torch.rand(IN),
        "fisher": torch.rand(OUT, IN),
    }
    objective = METHODS[name].objective(statistics)
    scaled, factors = objective.two_sided(), objective.factorize(torch.randn(OUT, IN), RANK)
    costs = [Channels.of(gauge(factors, scaled), scaled).cost() for gauge in (flat, balanced)]
    assert costs[0] <= costs[1] * (1 + 1e-6)


def test_without_moments_flat_is_balanced_and_rotated() -> None:
    factors = Factors(torch.randn(OUT, RANK), torch.randn(RANK, IN))
    chosen, start = flat(factors, PLAIN), factors.balanced()
    for found, before in ((chosen.up, start.up), (chosen.down, start.down)):
        torch.testing.assert_close(
            torch.linalg.svdvals(found).float(), torch.linalg.svdvals(before), rtol=1e-4, atol=1e-5
        )
    assert chosen.down.norm(dim=1).max() < 0.9 * start.down.norm(dim=1).max()


def test_rounding_of_the_inner_activations_costs_far_less() -> None:
    scaled = sides()
    factors = factors_of(scaled)
    x = (
        torch.randn(4000, IN, dtype=torch.float64)
        @ torch.linalg.cholesky(scaled.right.square(torch.eye(IN, dtype=torch.float64))).T
    )

    def lost(chosen: Factors) -> torch.Tensor:
        z = x @ chosen.down.double().T
        step = (z.max() - z.min()) / 255
        change = ((z / step).round() * step - z) @ chosen.up.double().T
        return (scaled.left.square(change.T) * change.T).sum()

    mean = sum(lost(flat(factors, scaled, seed)) for seed in range(4)) / 4
    assert mean < 0.5 * lost(factors.balanced())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more(dtype: torch.dtype) -> None:
    scaled = sides()
    factors = factors_of(scaled)
    whole = factors.product()

    def lost(chosen: Factors) -> torch.Tensor:
        return scaled.error(whole - chosen.up.to(dtype).double() @ chosen.down.to(dtype).double())

    assert lost(flat(factors, scaled)) < 1.1 * lost(factors.balanced())


@pytest.mark.parametrize("broken", ["zero", "deficient", "duplicate"])
def test_channels_that_carry_nothing_are_no_trouble(broken: str) -> None:
    scaled = sides()
    up, down = torch.randn(OUT, RANK), torch.randn(RANK, IN)
    if broken == "zero":
        up = torch.zeros_like(up)
    elif broken == "deficient":
        down[3:] = 0
    else:
        down[1:] = down[0]
    chosen = flat(Factors(up, down), scaled)
    assert torch.isfinite(chosen.up).all()
    assert torch.isfinite(chosen.down).all()
    torch.testing.assert_close(chosen.product().float(), up @ down, rtol=1e-4, atol=1e-4)


def test_the_rotation_is_the_same_every_time_and_no_global_generator_is_touched() -> None:
    before = torch.get_rng_state()
    first = random_rotation(RANK)
    torch.randn(3)
    torch.testing.assert_close(random_rotation(RANK), first, rtol=0, atol=0)
    torch.set_rng_state(before)
    flat(Factors(torch.ones(OUT, RANK), torch.ones(RANK, IN)), PLAIN)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first @ first.T, torch.eye(RANK, dtype=torch.float64))
    assert not torch.allclose(random_rotation(RANK, seed=1), first)


@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_equalizing_is_orthogonal_and_equalizes(size: int) -> None:
    moment = moment_of(size)
    turned = equalizing(moment)
    torch.testing.assert_close(turned.T @ turned, torch.eye(size, dtype=torch.float64))
    diagonal = (turned.T @ moment @ turned).diagonal()
    torch.testing.assert_close(diagonal, diagonal.mean().expand(size))


def test_the_two_sides_of_a_rotated_objective_are_those_before_the_rotation() -> None:
    rows, columns = torch.rand(OUT) + 0.1, torch.rand(IN) + 0.1
    left, right = random_rotation(OUT).float(), random_rotation(IN).float()
    objective = Rotated(ElementWise(rows[:, None] * columns), left, right)
    scaled, delta = objective.two_sided(), torch.randn(OUT, IN)
    torch.testing.assert_close(scaled.error(delta), objective.error(delta), rtol=1e-4, atol=1e-6)
    for side, size in ((scaled.left, OUT), (scaled.right, IN)):
        square = side.square(torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(side.diagonal(size), square.diagonal())
        torch.testing.assert_close(
            side.undo(side.apply(delta.double()[:1].new_ones(size, 1))).sum(), torch.tensor(float(size)).double()
        )


@pytest.mark.parametrize("side", [Scaling(), DiagonalScaling(torch.rand(IN)), whitening(moment_of(IN), 0.1)])
def test_the_diagonal_of_a_scaling_is_that_of_its_square(side: Scaling) -> None:
    torch.testing.assert_close(side.diagonal(IN), side.square(torch.eye(IN, dtype=torch.float64)).diagonal())
