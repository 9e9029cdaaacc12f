"""The solvers against theory: Eckart and Young for closed forms, monotone decrease and known optima otherwise."""

import pytest
import torch

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers import METHODS, get_method
from hf_lowrank.solvers.elementwise import ElementWise
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.methods import method
from hf_lowrank.solvers.scaled import DiagonalScaling, Scaled, Scaling, WhiteningScaling, truncated_svd

SHAPES = [(24, 40), (40, 24), (32, 32)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def heavy_tailed(*shape: int) -> torch.Tensor:
    return torch.randn(shape).exp().square()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a / b - 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_truncated_svd_is_that_of_linalg(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    left, right = truncated_svd(matrix, rank)
    torch.testing.assert_close(left @ right, (u[:, :rank] * s[:rank]) @ vh[:rank])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_svd_attains_the_eckart_young_bound(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape)
    factors = METHODS["svd"].objective({}).factorize(weight, rank)
    discarded = torch.linalg.svdvals(weight.double())[rank:].square().sum()
    torch.testing.assert_close((weight - factors.product()).square().sum(), discarded)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_fwsvd_attains_the_weighted_optimum(shape: tuple[int, int], rank: int) -> None:
    weight, rows = torch.randn(shape), heavy_tailed(shape[1])
    objective = METHODS["fwsvd"].objective({"fisher_rows": rows})
    error = objective.error(weight - objective.factorize(weight, rank).product())
    discarded = torch.linalg.svdvals(weight.double() * rows.double().sqrt())[rank:].square().sum()
    torch.testing.assert_close(error, discarded)
    torch.testing.assert_close(objective.spectrum(weight)[rank:].sum(), discarded)


def test_fwsvd_beats_svd_under_its_own_weights_and_loses_without_them() -> None:
    weight, rows = torch.randn(30, 50), heavy_tailed(50)
    plain = METHODS["svd"].objective({})
    weighted = METHODS["fwsvd"].objective({"fisher_rows": rows})
    by_plain, by_weighted = (weight - o.factorize(weight, 10).product() for o in (plain, weighted))
    assert weighted.error(by_weighted) < 0.8 * weighted.error(by_plain)
    assert plain.error(by_plain) < plain.error(by_weighted)


@pytest.mark.parametrize("zeros", ["one", "all"])
def test_zero_importance_divides_by_nothing(zeros: str) -> None:
    weight, rows = torch.randn(20, 30), heavy_tailed(30)
    rows[:] = 0 if zeros == "all" else rows
    rows[3] = 0
    factors = METHODS["fwsvd"].objective({"fisher_rows": rows}).factorize(weight, 5)
    assert torch.isfinite(factors.up).all()
    assert torch.isfinite(factors.down).all()
    kept = (weight - factors.product())[:, rows > 0]
    assert zeros == "all" or (kept.square() * rows[rows > 0]).sum() < (weight.square() * rows).sum()


def test_scaling_is_undone_at_any_scale() -> None:
    weight = torch.randn(20, 30)
    for scale in (1e-20, 1e-10, 1e10):
        rows = heavy_tailed(30)
        tiny, plain = (Scaled(Scaling(), DiagonalScaling(r)).factorize(weight, 6) for r in (rows * scale, rows))
        torch.testing.assert_close(tiny.product(), plain.product())


@pytest.mark.parametrize("shape", [(40, 23), (23, 40)])
def test_whitening_attains_the_optimum_and_decomposes_only_the_moment_of_the_shorter_side(
    shape: tuple[int, int],
) -> None:
    weight, factors = torch.randn(shape, dtype=torch.float64), [heavy_tailed(n, n).double() for n in shape]
    moments = [factor @ factor.T for factor in factors]
    objective = Scaled(*(WhiteningScaling(moment, 0.01) for moment in moments))
    damped = [moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment)) for moment in moments]
    left, right = (torch.linalg.cholesky(moment).T for moment in damped)
    worth = torch.linalg.svdvals(left @ weight @ right.T).square()
    found = objective.factorize(weight, 7)
    torch.testing.assert_close(objective.spectrum(weight), worth)
    torch.testing.assert_close(objective.error(weight - found.product()), worth[7:].sum())
    torch.testing.assert_close(objective.mass(shape), left.square().sum() * right.square().sum())
    assert [("upper" in vars(side)) for side in (objective.left, objective.right)] == [n == 23 for n in shape]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_moment_that_rounding_made_indefinite_is_damped_by_its_own_scale(scale: float) -> None:
    moment = scale * torch.diag(torch.tensor([4.0, 2.0, -1e-12], dtype=torch.float64))
    upper = WhiteningScaling(moment, 0.0).upper
    torch.testing.assert_close(upper.T @ upper, moment, rtol=0, atol=1e-8 * scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(LowRankError, match="not finite"):
        WhiteningScaling(torch.eye(3) * bad, 0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_tfwsvd_never_increases_and_starts_from_the_two_sided_form(shape: tuple[int, int], rank: int) -> None:
    weight, fisher = torch.randn(shape), heavy_tailed(*shape)
    objective = ElementWise(fisher, max_sweeps=15, tolerance=0)
    factors = objective.factorize(weight, rank)
    trace = torch.tensor(factors.trace)
    assert len(trace) == 16
    assert (trace[1:] <= trace[:-1] * (1 + 1e-5)).all()
    start = objective.error(weight - objective.two_sided().factorize(weight, rank).product())
    assert relative(torch.tensor(factors.trace[0]), start) == pytest.approx(0, abs=1e-2)  # the floor of tiny weights
    final = objective.error(weight - factors.product())
    assert final < 0.9 * start
    assert relative(torch.tensor(factors.trace[-1]), final) == pytest.approx(0, abs=1e-2)


def test_tfwsvd_solves_a_rank_one_importance_exactly() -> None:
    weight = torch.randn(24, 40)
    rows, columns = heavy_tailed(24).clamp_min(0.1), heavy_tailed(40).clamp_min(0.1)
    objective = ElementWise(rows[:, None] * columns, max_sweeps=5)
    scaled = rows.double().sqrt()[:, None] * weight * columns.double().sqrt()
    optimum = torch.linalg.svdvals(scaled)[6:].square().sum()
    assert relative(objective.error(weight - objective.factorize(weight, 6).product()), optimum) == pytest.approx(
        0, abs=1e-5
    )


def test_tfwsvd_equals_fwsvd_when_weights_are_constant_along_rows() -> None:
    weight, rows = torch.randn(24, 40), heavy_tailed(40)
    fwsvd = METHODS["fwsvd"].objective({"fisher_rows": 24 * rows})
    tfwsvd = METHODS["tfwsvd"].objective({"fisher": rows.expand(24, 40)})
    by_rows, by_element = (fwsvd.error(weight - o.factorize(weight, 6).product()) for o in (fwsvd, tfwsvd))
    assert relative(by_element, by_rows) == pytest.approx(0, abs=1e-3)


def test_tfwsvd_reaches_the_optimum_of_a_long_adam_run() -> None:
    weight, fisher = torch.randn(24, 40), torch.randn(24, 40).exp()
    objective = ElementWise(fisher, max_sweeps=200, tolerance=1e-7)
    start = objective.two_sided().factorize(weight, 6)
    up, down = (f.float().clone().requires_grad_() for f in (start.balanced().up, start.balanced().down))
    optimizer = torch.optim.Adam([up, down], lr=0.01)
    for _ in range(3000):
        optimizer.zero_grad()
        loss = (fisher * (weight - up @ down).square()).sum()
        loss.backward()
        optimizer.step()
    assert objective.error(weight - objective.factorize(weight, 6).product()) < loss * 1.01


def test_tolerance_and_limit_end_the_iteration() -> None:
    weight, fisher = torch.randn(24, 40), heavy_tailed(24, 40)
    assert len(ElementWise(fisher, max_sweeps=3, tolerance=0).factorize(weight, 6).trace) == 4
    loose, tight = (len(ElementWise(fisher, 500, t).factorize(weight, 6).trace) for t in (1e-2, 1e-3))
    assert 4 < loose < tight < 501


@pytest.mark.parametrize("zeros", ["row", "column", "all"])
def test_tfwsvd_survives_zero_importance(zeros: str) -> None:
    weight, fisher = torch.randn(20, 30), heavy_tailed(20, 30)
    fisher[{"row": (3,), "column": (slice(None), 3), "all": ()}[zeros]] = 0
    factors = ElementWise(fisher).factorize(weight, 5)
    assert torch.isfinite(factors.product()).all()
    assert ElementWise(fisher).error(weight - factors.product()) <= ElementWise(fisher).error(weight)


def test_balanced_factors_have_equal_spectra_and_the_same_product() -> None:
    factors = Factors(torch.randn(20, 5) * 100, torch.randn(5, 30) / 100)
    balanced = factors.balanced()
    torch.testing.assert_close(balanced.product(), factors.product(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.linalg.svdvals(balanced.up), torch.linalg.svdvals(balanced.down))


def test_a_registry_miss_lists_the_names_and_a_second_registration_is_refused() -> None:
    with pytest.raises(LowRankError, match="unknown method 'fsvd'.*svd, fwsvd, fwsvd2, tfwsvd, asvd, whiten"):
        get_method("fsvd")
    with pytest.raises(ValueError, match="exists already"):
        method("svd", "", "")(lambda statistics: METHODS["svd"].objective(statistics))
