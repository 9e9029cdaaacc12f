"""The optimizers of the element-wise objective: each against its definition, all against the same optimum."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers.elementwise import ElementWise
from hf_lowrank.solvers.optimizers import OPTIMIZERS, Solution, Trace, get_optimizer
from hf_lowrank.solvers.optimizers.alternating import diagonal_grams, reduced_precision
from hf_lowrank.solvers.optimizers.expectation import em_step
from hf_lowrank.solvers.optimizers.first_order import Point
from hf_lowrank.solvers.optimizers.least_squares import best_up
from hf_lowrank.solvers.optimizers.registry import register, weighted_error

RANK = 6
MONOTONE = ("alternating", "als", "em", "em-nesterov", "em-anderson")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def problem(spread: float, shape: tuple[int, int] = (24, 40)) -> tuple[Tensor, Tensor]:
    """A weight and a log-normal importance of mean 1."""
    weight, importance = torch.randn(shape), (spread * torch.randn(shape)).exp()
    return weight, importance / importance.mean()


def solve(name: str, weight: Tensor, importance: Tensor, iterations: int, tolerance: float = 0.0) -> Solution:
    """The optimizer's solution from the start that all share."""
    start = ElementWise(importance).two_sided().factorize(weight, RANK)
    return OPTIMIZERS[name](weight, importance, start.up.float(), start.down.float(), iterations, tolerance)


def error_of(weight: Tensor, importance: Tensor, solution: Solution) -> float:
    return float(weighted_error(importance, weight - solution.up @ solution.down))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_every_optimizer_improves_on_the_common_start(name: str, shape: tuple[int, int]) -> None:
    weight, importance = problem(1.0, shape)
    solution = solve(name, weight, importance, 60)
    values = solution.trace.values()
    start = ElementWise(importance).two_sided()
    at_start = weighted_error(importance, weight - start.factorize(weight, RANK).product().float())
    assert values[0] == pytest.approx(float(at_start), rel=1e-4)
    assert error_of(weight, importance, solution) < 0.9 * values[0]
    assert error_of(weight, importance, solution) == pytest.approx(min(values), rel=1e-3)
    assert len(values) == len(solution.trace.products) == len(solution.trace.seconds) <= 60 + 26
    assert solution.trace.products == sorted(solution.trace.products)
    assert (solution.up.shape, solution.down.shape) == ((shape[0], RANK), (RANK, shape[1]))


@pytest.mark.parametrize("name", MONOTONE)
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_alternation_and_em_never_increase_the_error(name: str, spread: float) -> None:
    trace = torch.tensor(solve(name, *problem(spread), 60).trace.values())
    assert (trace[1:] <= trace[:-1] * (1 + 1e-5)).all()


def test_the_exact_half_step_is_weighted_least_squares() -> None:
    weight, importance = problem(1.5)
    down = torch.randn(RANK, 40)
    up = best_up(weight, importance, down)
    for row, expected_weight, its_importance in zip(up, weight, importance, strict=True):
        root = its_importance.double().sqrt()
        system, target = (root * down).T, root * expected_weight
        expected = torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
        torch.testing.assert_close(row, expected.float())


def test_the_em_step_fills_in_and_truncates() -> None:
    weight, importance = problem(1.0)
    share, product = importance / importance.max(), torch.randn(24, 40)
    up, down = em_step(weight, share, product, RANK)
    u, s, vh = torch.linalg.svd(share * weight + (1 - share) * product, full_matrices=False)
    torch.testing.assert_close(up @ down, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], rtol=1e-4, atol=1e-4)


def test_the_factors_of_the_default_start_with_diagonal_grams_and_the_same_product() -> None:
    _, importance = problem(1.0)
    up, down = torch.randn(24, RANK) * 100, torch.randn(RANK, 40)
    new_up, new_down = diagonal_grams(up, down, importance)
    torch.testing.assert_close(new_up @ new_down, up @ down, rtol=1e-4, atol=1e-2)
    for gram in (
        (new_up.T * importance.mean(dim=1)) @ new_up,
        (new_down * importance.mean(dim=0)) @ new_down.T,
    ):
        scaled = gram / gram.diagonal().sqrt().outer(gram.diagonal().sqrt())
        torch.testing.assert_close(scaled, torch.eye(RANK), rtol=0, atol=1e-4)


def test_the_hybrid_switches_to_sgd_and_says_when() -> None:
    weight, importance = problem(1.0)
    solution, adam = (solve(name, weight, importance, 500) for name in ("adam-sgd", "adam"))
    values, switch = solution.trace.values(), solution.trace.events["switch to SGD"]
    assert 30 < switch < 500
    assert adam.trace.events == {}
    assert values[: switch + 1] == adam.trace.values()[: switch + 1]
    assert values[switch + 1 :] != adam.trace.values()[switch + 1 :]
    # Adam has all but arrived: what is left to gain is of the size of rounding.
    assert values[-1] == pytest.approx(min(values[: switch + 1]), rel=1e-6)


def test_sgd_recovers_from_a_rate_that_diverges() -> None:
    weight, importance = problem(2.0)
    start = ElementWise(importance).two_sided().factorize(weight, RANK)
    solution = OPTIMIZERS["sgd"](weight, importance, start.up.float(), start.down.float(), 200, 0.0, learning_rate=1e4)
    values = solution.trace.values()
    assert not max(values[:11]) <= values[0]
    assert error_of(weight, importance, solution) < values[0]


def test_the_gradients_are_those_of_the_error() -> None:
    weight, importance = problem(1.0)
    point = Point(weight, importance, torch.randn(24, RANK), torch.randn(RANK, 40))
    up, down = (factor.clone().requires_grad_() for factor in point.parameters)
    error = weighted_error(importance, weight - up @ down)
    expected = torch.autograd.grad(error, (up, down))
    torch.testing.assert_close(point.evaluate(), error.detach())
    torch.testing.assert_close([factor.grad for factor in point.parameters], list(expected))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_stop_by_the_relative_decrease(name: str) -> None:
    weight, importance = problem(0.5)
    loose, tight = (solve(name, weight, importance, 400, tolerance).trace for tolerance in (3e-2, 3e-3))
    assert len(loose.errors) <= len(tight.errors) < 401
    for trace, tolerance in ((loose, 3e-2), (tight, 3e-3)):
        values = trace.values()
        before, lowest = min(values[: -trace.patience]), min(values)
        assert before - lowest < tolerance * before


def test_the_stopping_rule_looks_back_as_far_as_its_patience() -> None:
    trace = Trace(patience=2)
    for error in (8.0, 4.0, 5.0):
        trace.record(torch.tensor(error), 1)
        assert not trace.converged(0.1)
    trace.record(torch.tensor(float("nan")), 2)
    assert trace.converged(0.1)
    assert not trace.converged(0.0)
    assert trace.products == [1, 2, 3, 5]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_attain_the_optimum_of_a_rank_one_importance(name: str) -> None:
    weight = torch.randn(24, 40)
    rows, columns = (0.7 * torch.randn(24)).exp(), (0.7 * torch.randn(40)).exp()
    importance = rows[:, None] * columns / (rows.mean() * columns.mean())
    scaled = importance.double().sqrt() * weight
    optimum = float(torch.linalg.svdvals(scaled)[RANK:].square().sum())
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)  # a start that is not the optimum
    up, down = u[:, :RANK] * s[:RANK], vh[:RANK]
    solution = OPTIMIZERS[name](weight, importance, up, down, 800, 0.0)
    assert solution.trace.values()[0] > 1.05 * optimum
    assert error_of(weight, importance, solution) == pytest.approx(optimum, rel=1e-2)


def test_the_default_is_as_good_as_every_other() -> None:
    weight, importance = problem(1.0, (32, 48))
    errors = {
        name: error_of(weight, importance, solve(name, weight, importance, 500, tolerance=1e-6)) for name in OPTIMIZERS
    }
    default = errors.pop("alternating")
    assert default <= 1.005 * min(errors.values()), errors


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_objective_takes_any_optimizer(name: str) -> None:
    weight, importance = problem(1.0)
    objective = ElementWise(1e-9 * importance, max_sweeps=40, optimizer=name)
    factors = objective.factorize(weight, RANK)
    error = float(objective.error(weight - factors.product()))
    assert error == pytest.approx(min(factors.trace), rel=1e-2)
    assert error < factors.trace[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_survive_weights_of_low_rank(name: str) -> None:
    _, importance = problem(1.0)
    weight = torch.randn(24, 3) @ torch.randn(3, 40)
    for its_weight in (weight, torch.zeros(24, 40)):
        factors = ElementWise(importance, optimizer=name).factorize(its_weight, RANK)
        torch.testing.assert_close(factors.product(), its_weight, rtol=1e-3, atol=1e-4)


def test_a_parameter_can_be_factorized() -> None:
    weight, importance = problem(1.0)
    factors = ElementWise(importance).factorize(torch.nn.Parameter(weight), RANK)
    assert not factors.up.requires_grad


def test_reduced_precision_is_given_back() -> None:
    given = torch.get_float32_matmul_precision()
    with reduced_precision():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == given


def test_a_miss_lists_the_names_and_a_second_registration_is_refused() -> None:
    with pytest.raises(LowRankError, match="unknown optimizer 'adamw'; the optimizers are alternating, "):
        get_optimizer("adamw")
    with pytest.raises(LowRankError, match="sgd, adam, adam-sgd, lbfgs"):
        ElementWise(torch.ones(2, 2), optimizer="")
    with pytest.raises(ValueError, match="exists already"):
        register("als")(functools.partial(solve, "als"))


@pytest.mark.parametrize("name", ["alternating", "als", "sgd", "adam", "lbfgs"])  # EM counts an eigenproblem besides
def test_the_products_of_a_trace_are_those_that_were_made(name: str) -> None:
    weight, importance = problem(1.0, (96, 160))
    start = ElementWise(importance).two_sided().factorize(weight, RANK)
    with FlopCounterMode(display=False) as counter:
        solution = OPTIMIZERS[name](weight, importance, start.up.float(), start.down.float(), 10, 0.0)
    made = counter.get_total_flops() / (2 * 96 * 160 * RANK)
    assert solution.trace.products[-1] == pytest.approx(made, rel=0.1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_two_sided_importance_of_rank_one_is_the_importance_itself(scale: float) -> None:
    importance = scale * torch.outer(torch.rand(24), torch.rand(40)) / 100
    delta = torch.randn(24, 40)
    exact = ElementWise(importance)
    torch.testing.assert_close(exact.two_sided().error(delta), exact.error(delta), rtol=1e-4, atol=0)
