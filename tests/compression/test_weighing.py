"""Every layer is decomposed once, for its rank and its factors; what the report says of them is what they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowrank import CompressionConfig, compress, compute_statistics
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.compression.weighing import largest_rank
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.distributed import shares
from hf_lowrank.model.targets import find_targets
from hf_lowrank.model.weights import whole_weight
from hf_lowrank.solvers import get_method
from hf_lowrank.statistics import Statistics
from tests.helpers import tiny_bert, token_ids

CONFIG = CompressionConfig("kfac", keep=0.4, sequential=False)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    batches = [{"input_ids": token_ids(seed, 6, 8), "labels": torch.tensor([0, 1, 1, 0, 1, 0])} for seed in range(4)]
    return compute_statistics(tiny_bert(), batches, CONFIG.needs, progress=False)


class Decompositions(TorchDispatchMode):
    """Within the block, the sizes of the matrices of which eigenvectors are sought."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.overloadpacket.__name__ in ("_linalg_eigh", "_linalg_svd"):
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_every_layer_is_decomposed_once(statistics: Statistics) -> None:
    model = tiny_bert()
    sides = [min(target.shape) for target in find_targets(model).values()]
    with Decompositions() as seen:
        _, report = compress(model, CONFIG, statistics, progress=False)
    assert all((layer.rank or 0) < min(sides) for layer in report.layers)
    assert sorted(size for size in seen.sizes if size >= min(sides)) == sorted(sides)


def test_a_resumed_job_decomposes_nothing_again(statistics: Statistics, tmp_path: Path) -> None:
    expected, _ = compress(tiny_bert(), CONFIG, statistics, progress=False)
    work, model = Work.open(tmp_path / "work", {"job": 1}), tiny_bert()
    sides = [min(target.shape) for target in find_targets(model).values()]
    compress(model, CONFIG, statistics, False, work=work)
    work.store("factors").remove()  # as if it had been killed once the ranks were known
    model = tiny_bert()
    with Decompositions() as seen:
        resumed, _ = compress(model, CONFIG, statistics, False, work=work)
    assert max(seen.sizes) < min(sides)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_errors_of_the_report_are_those_of_the_stored_factors(statistics: Statistics, dtype: torch.dtype) -> None:
    dense = tiny_bert().to(dtype)
    name, target = next(iter(find_targets(dense).items()))
    method = get_method("kfac")
    solver, weight = LayerSolver({name: target}, method, statistics), whole_weight(target.module).float()
    objective = method.objective({kind: statistics.mean(kind, name) for kind in method.needs})
    for rank in (2, 12):
        found = solver.weigh(name, largest_rank(target.shape, CONFIG.spread, "factors"))[1]
        low_rank, report, _ = solver.low_rank(name, rank, found)
        up, down = (factor.detach().float() for factor in low_rank.matrices())
        delta = weight - up @ down
        error = float(objective.error(delta))
        assert report.weighted_error == pytest.approx((error / float(objective.error(weight))) ** 0.5, rel=0.01)
        assert report.expected_loss == pytest.approx(error * statistics.curvature / 2, rel=0.02)
        assert report.relative_error == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)


def test_a_rank_beyond_what_was_kept_is_found_anew(statistics: Statistics) -> None:
    name, target = next(iter(find_targets(tiny_bert()).items()))
    solver = LayerSolver({name: target}, get_method("kfac"), statistics)
    few, rank = solver.weigh(name, 3)[1], 9
    assert few is not None
    found, expected = (solver.low_rank(name, rank, known)[0] for known in (few, None))
    assert found.rank == rank
    assert torch.equal(found.product(), expected.product())


def test_who_holds_something_solves_it() -> None:
    costs = {"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}
    assert shares(costs, 2, {"a": 1, "b": 1, "gone": 0}) == [["c", "d"], ["a", "b"]]
