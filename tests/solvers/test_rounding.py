"""Rounding against theory: what is expected of the error, that entries make up for each other, and the scale rule."""

import pytest
import torch
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers.expected_rounding import Scheme, error_of_dense, error_of_factors
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import balanced, flat
from hf_lowrank.solvers.rounded_factors import Grids, round_factors, round_weight
from hf_lowrank.solvers.rounding import Grid, round_to_nearest, round_with_moments, unit_upper
from hf_lowrank.solvers.scaled import DiagonalScaling, Scaled, Scaling, whitening

OUT, IN, RANK = 24, 40, 8
GRIDS = [Grid(8), Grid(4), Grid(4, 16), Grid(3, 7)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def moment_of(size: int) -> Tensor:
    """With a falling spectrum, as that of hidden states."""
    rows = torch.randn(4 * size, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    rows = rows * torch.randn(size).exp()
    return rows.T @ rows / len(rows)


def sides() -> Scaled:
    return Scaled(whitening(moment_of(OUT), 1e-2), whitening(moment_of(IN), 1e-3))


def moments(scaled: Scaled) -> tuple[Tensor, Tensor]:
    return scaled.left.gram(OUT), scaled.right.gram(IN)


@pytest.mark.parametrize("grid", GRIDS)
def test_nearest_is_within_half_a_step_and_the_largest_is_exact(grid: Grid) -> None:
    weight = torch.randn(OUT, IN)
    rounded = round_to_nearest(weight, grid)
    assert ((rounded.weight() - weight).abs() <= grid.steps(weight) / 2 * (1 + 1e-5)).all()
    assert rounded.codes.abs().max() == grid.top
    assert torch.isclose(rounded.weight().abs().max(), weight.abs().max())


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_the_result_to_nearest_changes_nothing(grid: Grid) -> None:
    rounded = round_with_moments(torch.randn(OUT, IN), *moments(sides()), grid)
    for dtype in (torch.float64, torch.float32):
        again = round_to_nearest(rounded.weight().to(dtype), grid)
        assert torch.equal(again.codes, rounded.codes)
        torch.testing.assert_close(again.scales, rounded.scales.to(dtype))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("whole", [False, True])
def test_with_diagonal_moments_it_is_rounding_to_nearest(grid: Grid, whole: bool) -> None:
    weight, outputs, inputs = torch.randn(OUT, IN), torch.rand(OUT) + 0.1, torch.rand(IN) + 0.1
    given = (outputs.diag(), inputs.diag()) if whole else (outputs, inputs)
    assert torch.equal(round_with_moments(weight, *given, grid).codes, round_to_nearest(weight, grid).codes)


def test_the_triangles_give_the_moment_back() -> None:
    moment = moment_of(IN)
    triangle, pivots = unit_upper(moment)
    assert triangle is not None
    unit = triangle + torch.eye(IN)
    torch.testing.assert_close(unit @ pivots.diag() @ unit.T, moment)


@pytest.mark.parametrize("grid", [Grid(8), Grid(6), Grid(6, 20)])
def test_the_error_is_what_is_expected(grid: Grid) -> None:
    scaled = sides()
    for with_moments in (False, True):
        found, expected = 0.0, 0.0
        for _ in range(40):
            weight = torch.randn(OUT, IN, dtype=torch.float64)
            rounded = (
                round_with_moments(weight, *moments(scaled), grid) if with_moments else round_to_nearest(weight, grid)
            )
            found += float(scaled.error(rounded.weight() - weight))
            expected += error_of_dense(weight, scaled, Scheme(grid, with_moments=with_moments))
        assert 0.85 < found / expected < 1.2


@pytest.mark.parametrize("grid", GRIDS)
def test_moments_of_both_sides_beat_those_of_the_inputs_and_these_rounding_to_nearest(grid: Grid) -> None:
    scaled = sides()
    outputs, inputs = moments(scaled)
    nearest, gptq, both = 0.0, 0.0, 0.0
    for _ in range(10):
        weight = torch.randn(OUT, IN, dtype=torch.float64)
        nearest += float(scaled.error(round_to_nearest(weight, grid).weight() - weight))
        gptq += float(scaled.error(round_with_moments(weight, outputs.diagonal(), inputs, grid).weight() - weight))
        both += float(scaled.error(round_with_moments(weight, outputs, inputs, grid).weight() - weight))
    assert gptq < 0.85 * nearest
    assert both < 0.85 * gptq


def test_moments_of_few_samples_are_made_definite() -> None:
    rows = torch.randn(3, IN, dtype=torch.float64)
    moment, weight = rows.T @ rows - 1e-12 * torch.eye(IN), torch.randn(OUT, IN)
    codes = round_with_moments(weight, torch.ones(OUT), moment, Grid(4)).codes
    made = codes * Grid(4).scales(weight) - weight, round_to_nearest(weight, Grid(4)).weight() - weight
    lost = [float((rows @ change.T.double()).norm()) for change in made]
    assert lost[0] < 0.5 * lost[1]
    assert (unit_upper(torch.zeros(4, 4))[1] > 0).all()


def test_a_diagonal_output_moment_only_scales_rows() -> None:
    weight, inputs = torch.randn(OUT, IN), moment_of(IN)
    codes = [
        round_with_moments(weight, outputs, inputs, Grid(4)).codes for outputs in (torch.ones(OUT), torch.rand(OUT))
    ]
    assert torch.equal(*codes)


def test_it_is_gptq_in_the_form_of_its_paper() -> None:
    weight, inputs, grid = torch.randn(OUT, IN, dtype=torch.float64), moment_of(IN) + 0.01 * torch.eye(IN), Grid(4)
    steps, left, expected = grid.steps(weight), weight.clone(), weight.clone()
    largest = weight.abs() == weight.abs().amax(dim=1, keepdim=True)  # which is kept
    upper = torch.linalg.cholesky(torch.linalg.inv(inputs), upper=True)
    for j in range(IN):  # Frantar et al., algorithm 1
        nearest = (left[:, j] / steps[:, j]).round().clamp(-grid.top, grid.top) * steps[:, j]
        expected[:, j] = torch.where(largest[:, j], weight[:, j], nearest)
        left[:, j:] -= ((left[:, j] - expected[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    torch.testing.assert_close(round_with_moments(weight, torch.ones(OUT), inputs, grid).weight(), expected)


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(4, 4)])
def test_factors_lose_far_less_by_moments_than_by_rounding_to_nearest(grid: Grid, lookup: bool) -> None:
    scaled = sides()
    if lookup:
        scaled = Scaled(scaled.left, DiagonalScaling(torch.randn(IN).exp()))
    factors = flat(scaled.factorize(torch.randn(OUT, IN), RANK), scaled)

    def turned(matrix: Tensor) -> Tensor:
        return matrix.T if lookup else matrix

    nearest = round_to_nearest(factors.up, grid).weight() @ turned(
        round_to_nearest(turned(factors.down), grid).weight()
    )
    by_moments = round_factors(factors, scaled, Grids(grid, grid, lookup)).factors.product()
    errors = [scaled.error(factors.product() - product) for product in (by_moments, nearest)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("lookup", [False, True])
def test_the_error_of_factors_is_what_is_expected(lookup: bool) -> None:
    scaled, grid, found, expected = sides(), Grid(6), 0.0, 0.0
    if lookup:
        scaled = Scaled(scaled.left, DiagonalScaling(torch.randn(IN).exp()))
    for _ in range(40):
        factors = flat(scaled.factorize(torch.randn(OUT, IN), RANK), scaled)
        down = factors.down.T if lookup else factors.down
        rounded = round_to_nearest(down, grid).weight()
        product = round_to_nearest(factors.up, grid).weight() @ (rounded.T if lookup else rounded)
        found += float(scaled.error(factors.product() - product))
        expected += error_of_factors(factors, scaled, Scheme(grid), lookup)
    assert 0.85 < found / expected < 1.2


def test_what_is_expected_is_least_in_the_flat_basis() -> None:
    scaled = sides()
    factors = scaled.factorize(torch.randn(OUT, IN), RANK)
    for scheme in (Scheme(Grid(8)), Scheme(Grid(8), 8), Scheme(Grid(4, 4))):
        there, before = (error_of_factors(gauge(factors, scaled), scaled, scheme) for gauge in (flat, balanced))
        assert there < before


def test_fewer_bits_and_larger_groups_cost_more() -> None:
    scaled, weight = sides(), torch.randn(OUT, IN)
    costs = [error_of_dense(weight, scaled, Scheme(grid)) for grid in (Grid(8), Grid(4, 8), Grid(4, 16), Grid(4))]
    assert costs == sorted(costs)
    rounded_inputs = error_of_dense(weight, scaled, Scheme(Grid(8), activation_bits=8))
    assert rounded_inputs > costs[0]


def test_zero_weights_and_bad_grids() -> None:
    weight = 100 * torch.randn(OUT, IN)
    weight[3], weight[5, 16:32] = 0, 0
    rounded = round_with_moments(weight, *moments(sides()), Grid(4, 16)).weight()
    assert not rounded[3].any()
    assert not rounded[5, 16:32].any()
    for arguments, message in (((1,), "2 to 8 bits, not 1"), ((16,), "not 16"), ((4, 0), "at least 1 weight")):
        with pytest.raises(LowRankError, match=message):
            Grid(*arguments)


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, 16)])
def test_other_scales_are_kept(grid: Grid) -> None:
    scaled, weight = sides(), torch.randn(OUT, IN, dtype=torch.float64)
    scales = 0.8 * grid.scales(weight)
    rounded, nearest = (
        round_with_moments(weight, *moments(scaled), grid, scales),
        round_to_nearest(weight, grid, scales),
    )
    assert torch.equal(rounded.scales, scales)
    assert torch.equal(round_to_nearest(rounded.weight(), grid, scales).codes, rounded.codes)
    assert scaled.error(rounded.weight() - weight) < 0.9 * scaled.error(nearest.weight() - weight)


def test_methods_without_moments_round_too() -> None:
    factors = Factors(torch.randn(OUT, RANK), torch.randn(RANK, IN))
    found = round_factors(factors, Scaled(Scaling(), Scaling()), Grids(Grid(8), Grid(8)))
    change = found.factors.product() - factors.product()
    assert change.norm() < 0.02 * factors.product().norm()


@pytest.mark.parametrize("diagonal", [False, True])
def test_tiles_change_nothing(diagonal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, inputs = moments(sides())
    weight, found = torch.randn(OUT, IN, dtype=torch.float64), []
    for tile in (7, 1000):
        monkeypatch.setattr("hf_lowrank.solvers.rounding.TILE", tile)
        monkeypatch.setattr("hf_lowrank.solvers.rounding.NARROW", tile)
        found.append(round_with_moments(weight, outputs.diagonal() if diagonal else outputs, inputs, Grid(4)).codes)
    assert torch.equal(*found)


def heavy_tailed(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) ** 3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 8])
def test_clipped_scales_lose_no_more_than_those_of_the_largest_weight(bits: int, group: int | None) -> None:
    weight, grid = heavy_tailed(OUT, IN), Grid(bits, group, clipped=True)
    plain = grid.largest(weight) / (grid.top + 0.5)
    found, before = (round_to_nearest(weight, grid, scales) for scales in (grid.scales(weight), plain))
    assert found.codes.min() >= -grid.top - 1
    assert (found.weight() - weight).square().sum() <= (before.weight() - weight).square().sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_have_the_dtype_in_which_they_are_stored(dtype: torch.dtype) -> None:
    scaled, grid = sides(), Grid(8, clipped=True, scales_in=dtype)
    scales = round_with_moments(torch.randn(OUT, IN), *moments(scaled), grid).scales
    assert torch.equal(scales, scales.to(dtype).to(scales))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("lookup", [False, True])
def test_it_never_loses_more_than_rounding_to_nearest(bits: int, lookup: bool) -> None:
    grid = Grid(bits, 8, clipped=True)
    for _ in range(10):
        scaled, weight = sides(), heavy_tailed(OUT, IN)
        factors = flat(scaled.factorize(weight, RANK), scaled)
        stored = factors.down.T if lookup else factors.down
        down = round_to_nearest(stored, grid).weight()
        product = round_to_nearest(factors.up, grid).weight() @ (down.T if lookup else down)
        found = round_factors(factors, scaled, Grids(grid, grid, lookup)).factors.product()
        assert scaled.error(found - factors.product()) <= scaled.error(product - factors.product())
        turned = weight.T if lookup else weight
        rounded = [
            values.weight() - turned
            for values in (round_weight(weight, scaled, grid, lookup), round_to_nearest(turned, grid))
        ]
        errors = [scaled.error(change.T if lookup else change) for change in rounded]
        assert errors[0] <= errors[1]


def test_known_columns_stay_and_a_factor_that_is_not_rounded_takes_up_the_error() -> None:
    scaled, grid = sides(), Grid(4, clipped=True)
    factors = scaled.factorize(torch.randn(OUT, IN), RANK)
    columns = torch.randperm(IN)[:25]
    found = round_factors(factors, scaled, Grids(None, grid, columns=columns))
    others = torch.ones(IN, dtype=torch.bool).index_fill(0, columns, False)
    assert torch.equal(found.factors.down[:, others], factors.down[:, others])
    torch.testing.assert_close(found.factors.down[:, columns], found.down.weight())
    kept = scaled.error(factors.product() - factors.up @ found.factors.down)
    assert scaled.error(factors.product() - found.factors.product()) < 0.95 * kept
