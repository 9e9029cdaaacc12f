"""The Kronecker product nearest to the Fisher information: against the SVD of its rearrangement, and through breaks."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor

from hf_lowrank import CompressionConfig, LowRankError, Statistics, compress, compute_statistics
from hf_lowrank.compression.memory import statistics_bytes
from hf_lowrank.compression.report import CompressionReport
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics import collect, names
from hf_lowrank.statistics.kronecker import (
    SKETCH,
    add_fisher_sketch,
    add_kronecker_in,
    add_kronecker_out,
    cosine,
    rise,
    unit,
)
from hf_lowrank.statistics.names import MOST_PASSES, passes
from tests.helpers import tiny_bert
from tests.launches import Job
from tests.statistics.test_statistics import padded_batch

NEEDS = ("kronecker_in", "kronecker_out", "fisher_sketch")
LENGTHS = (9, 4, 7, 1, 8, 5, 3, 6, 2, 9, 7, 4)


def model() -> Any:
    return tiny_bert(num_labels=3, hidden_size=16, intermediate_size=32, num_hidden_layers=1)


def batches(size: int = 4) -> list[dict[str, Tensor]]:
    labels = torch.arange(len(LENGTHS)) * 7 % 3
    whole = padded_batch(labels, LENGTHS)
    return [{key: value[n : n + size] for key, value in whole.items()} for n in range(0, len(LENGTHS), size)]


def sample_gradients(names: list[str]) -> dict[str, Tensor]:
    """G_n of every sample, by PyTorch alone [samples, out, in], float64."""
    own = model()
    weights = {name: own.get_submodule(name).weight for name in names}
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches(size=1):
        own.zero_grad()
        own(**batch).loss.backward()
        for name, weight in weights.items():
            gradients[name].append(weight.grad.double())
    return {name: torch.stack(each) for name, each in gradients.items()}


def rearranged(gradients: Tensor) -> Tensor:
    """E G_n ⊗ G_n as a map from [in, in] to [out, out], in which a Kronecker product has rank 1."""
    count, rows, columns = gradients.shape
    fisher = torch.einsum("nab,ncd->acbd", gradients, gradients) / count
    return fisher.reshape(rows * rows, columns * columns)


def cosine_with(fisher: Tensor, out: Tensor, in_: Tensor) -> float:
    b, a = out.double().flatten(), in_.double().flatten()
    return float((b @ fisher @ a) / (b.norm() * a.norm() * fisher.norm()))


@pytest.fixture(scope="module")
def measured() -> Statistics:
    return compute_statistics(model(), batches(), NEEDS, progress=False)


def reached_and_nearest(measured: Statistics) -> Iterator[tuple[str, float, float]]:
    """For each layer the cosine of its factors with the exact Fisher information, and the largest there is."""
    for name, gradients in sample_gradients(list(measured.weights)).items():
        fisher = rearranged(gradients)
        reached = cosine_with(fisher, measured.mean("kronecker_out", name), measured.mean("kronecker_in", name))
        largest = torch.linalg.eigvalsh(fisher @ fisher.T if len(fisher) < fisher.shape[1] else fisher.T @ fisher)[-1]
        yield name, reached, float(largest.sqrt() / fisher.norm())


def test_the_factors_are_close_to_the_nearest_and_their_cosine_is_reported(measured: Statistics) -> None:
    for name, reached, nearest in reached_and_nearest(measured):
        assert 0.995 * nearest <= reached <= nearest + 1e-6
        assert measured.fisher_cosine(name) == pytest.approx(reached, rel=0.1)


def test_with_more_turns_the_factors_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MOST_PASSES", 30)
    monkeypatch.setattr(collect, "RISE", 1e-6)
    for _, reached, nearest in reached_and_nearest(compute_statistics(model(), batches(), NEEDS, progress=False)):
        assert reached == pytest.approx(nearest, abs=1e-4)


def samples(tokens: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Inputs [count, tokens, 12] and gradients [count, tokens, 9], correlated and badly scaled."""
    torch.manual_seed(0)
    x = torch.randn(count, tokens, 12) @ torch.randn(12, 12) * torch.logspace(-1, 1, 12)
    return x, torch.randn(count, tokens, 9) @ torch.randn(9, 9) * torch.logspace(-2, 0, 9)


@pytest.mark.parametrize("tokens", [2, 30])
def test_every_turn_comes_nearer(tokens: int) -> None:
    x, g = samples(tokens)
    fisher = rearranged(torch.einsum("nto,nti->noi", g, x).double())
    out, in_ = torch.zeros(9, 9), torch.zeros(12, 12)
    add_kronecker_out(out, x, g, None)
    out /= len(x)
    cosines, norms = [cosine_with(fisher, out, torch.eye(12))], [float(out.norm())]
    for number in range(7):
        newer, add, older = (in_, add_kronecker_in, out) if number % 2 == 0 else (out, add_kronecker_out, in_)
        newer.zero_()
        add(newer, x, g, unit(older))
        newer /= len(x)
        cosines.append(cosine_with(fisher, out, in_))
        norms.append(float(newer.norm()))
        assert rise(out, in_) == pytest.approx(norms[-1] / norms[-2] - 1, abs=1e-5)
    assert all(after >= before - 1e-6 for before, after in pairwise(cosines))
    assert cosines[-1] > cosines[0] + 0.05
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(cosines) * float(fisher.norm()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("tokens", [2, 30])
def test_a_sketch_has_the_norm_of_the_fisher_information(tokens: int) -> None:
    x, g = samples(tokens)
    total = torch.zeros(SKETCH, SKETCH)
    add_fisher_sketch(total, x, g)
    fisher = rearranged(torch.einsum("nto,nti->noi", g, x).double())
    assert float(total.norm()) / len(x) == pytest.approx(float(fisher.norm()), rel=0.1)


def test_a_sketch_is_exact_where_gradients_are_parallel() -> None:
    (x, g), sizes = samples(tokens=1, count=1), torch.tensor([1.0, -2.0, 3.0])
    total = torch.zeros(SKETCH, SKETCH)
    add_fisher_sketch(total, x.expand(3, -1, -1), g * sizes[:, None, None])
    length = float((g[0].T @ x[0]).norm())
    assert float(total.norm()) == pytest.approx(length**2 * float(sizes.square().sum()), rel=1e-4)


def test_without_gradients_the_cosine_is_zero() -> None:
    assert cosine(torch.zeros(3, 3), torch.zeros(2, 2), torch.zeros(SKETCH, SKETCH)) == 0


class Killed(Exception):
    pass


class Breaking:
    """Batches that end in the middle of a pass, by the number of batches that were taken."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in batches():
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield batch


@pytest.mark.parametrize("after", [3, 7, 8, 10])
def test_a_killed_measurement_goes_on_to_the_same_bits(tmp_path: Path, measured: Statistics, after: int) -> None:
    work = Work.open(tmp_path / "work", {}, minutes=0)
    with pytest.raises(Killed):
        compute_statistics(model(), Breaking(after), NEEDS, progress=False, work=work)
    work = Work.open(tmp_path / "work", {}, resume=True, minutes=0)
    again = compute_statistics(model(), batches(), NEEDS, progress=False, work=work)
    assert all(
        torch.equal(again.sums[kind][name], measured.sums[kind][name]) for kind in NEEDS for name in again.weights
    )
    finished = [path.name for path in (tmp_path / "work").glob("statistics-*")]
    assert len(finished) == 1  # those of earlier passes are let go of
    work = Work.open(tmp_path / "work", {}, resume=True, minutes=0)
    compute_statistics(model(), Breaking(0), NEEDS, progress=False, work=work)  # nothing is left to measure


class Counted:
    """One sample of one token, whose gradients are products of two vectors, and how often it was taken."""

    taken = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.taken += 1
        yield padded_batch(torch.tensor([1]), (1,))


def test_turns_end_when_nothing_is_gained() -> None:
    data = Counted()
    found = compute_statistics(model(), data, NEEDS, progress=False)
    assert data.taken == 3  # the third pass brings nothing new
    reached = [name for name in found.weights if found.reach(name)]
    assert [found.fisher_cosine(name) for name in reached] == pytest.approx([1.0] * len(reached))


def test_one_factor_alone_is_measured_with_the_other() -> None:
    plan = passes(["kronecker_in", "fisher"])
    assert plan[:3] == [("fisher", "kronecker_out"), ("kronecker_in",), ("kronecker_out",)]
    assert len(plan) == MOST_PASSES


def test_memory_for_the_turns_is_known() -> None:
    targets = dict([next(iter(find_targets(model()).items()))])
    assert statistics_bytes(targets, ["kronecker_in"]) == 4 * 2 * (16**2 + 16**2)


def measure_share(output: Path) -> None:
    state = PartialState()
    shared = compute_statistics(model(), batches()[state.process_index :: state.num_processes], NEEDS, progress=False)
    shared.save(output / str(state.process_index))


def test_two_processes_find_what_one_finds(tmp_path: Path, measured: Statistics) -> None:
    Job(tmp_path / "job", measure_share, tmp_path, processes=2).done()
    first, second = (Statistics.load(tmp_path / str(rank)) for rank in range(2))
    for name in measured.weights:
        for kind in NEEDS:
            total = measured.sums[kind][name]
            assert torch.equal(first.sums[kind][name], second.sums[kind][name])
            torch.testing.assert_close(first.sums[kind][name], total, rtol=1e-3, atol=1e-5 * float(total.abs().max()))
        assert first.fisher_cosine(name) == pytest.approx(measured.fisher_cosine(name), rel=1e-4)


def test_the_report_says_how_near_and_keeps_it(tmp_path: Path, measured: Statistics) -> None:
    measured.save(tmp_path / "measured")
    kept = Statistics.load(tmp_path / "measured")
    _, report = compress(model(), CompressionConfig("gfwsvd", 0.25, allocation="uniform"), kept, progress=False)
    assert {layer.name: layer.fisher_cosine for layer in report.layers} == {
        name: measured.fisher_cosine(name) for name in measured.weights
    }
    assert "\ncosine with the Fisher information of whole samples 0." in report.summary()
    assert CompressionReport.from_dict(report.to_dict()) == report
    _, other = compress(model(), CompressionConfig("svd", 0.25), progress=False)
    assert all(layer.fisher_cosine is None for layer in other.layers)


def test_no_sketch_of_an_embedding() -> None:
    with pytest.raises(LowRankError, match="word_embeddings: fisher_sketch cannot be measured of an embedding"):
        compute_statistics(model(), batches(), ["fisher_sketch"], include=["word_embeddings"])
