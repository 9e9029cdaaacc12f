"""One, two and three processes: the same statistics up to summation order, the same factors bit for bit."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState, cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_lowrank import CompressionConfig, LowRankError, Statistics, compress, compute_statistics
from hf_lowrank.allocation import Layer
from hf_lowrank.compression.latency import measured_latency
from hf_lowrank.compression.profiling import mean_loss, profile_losses
from hf_lowrank.folder.saving import read_record
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.distributed import divided, on_main, shares
from hf_lowrank.jobs.files import write_json
from hf_lowrank.model.targets import Target
from hf_lowrank.model.weights import model_digest, unwrapped
from hf_lowrank.statistics.collect import lockstep
from hf_lowrank.statistics.shared import InputSums
from tests.helpers import outputs, tiny_bert, tiny_llama
from tests.launches import ROOT, Job, content, hf_lowrank, launch, make_data, make_model
from tests.statistics.test_statistics import padded_batch

KINDS = ["activation_moment", "active_tokens", "fisher", "gradient_moment", "fisher_in_eigenbasis"]  # two passes


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What all commands on a tiny model have in common."""
    folder = tmp_path_factory.mktemp("tiny")
    return [make_model(folder / "model"), "--task", "cola", "--data-dir", make_data(folder / "data"), "--batch-size", 3]


def batches() -> list[dict[str, torch.Tensor]]:
    """Five samples in three batches."""
    whole = padded_batch(torch.tensor([0, 1, 1, 0, 1]), lengths=(9, 8, 6, 4, 1))
    return [{key: value[part] for key, value in whole.items()} for part in (slice(0, 2), slice(2, 4), slice(4, 5))]


def assert_equal_up_to_order(found: Statistics, expected: Statistics) -> None:
    assert (found.samples, found.tokens, found.weights) == (expected.samples, expected.tokens, expected.weights)
    for kind, sums in expected.sums.items():
        for name, total in sums.items():
            torch.testing.assert_close(found.sums[kind][name], total, rtol=1e-4, atol=1e-5 * float(total.abs().max()))


# --- statistics ---


@pytest.mark.slow
def test_statistics_do_not_depend_on_the_number_of_processes(common: list[Any], tmp_path: Path) -> None:
    kinds = [word for kind in KINDS for word in ("--kind", kind)]
    for processes in (1, 2, 3):  # 25 samples
        words = ["statistics", *common, *kinds, "--output", tmp_path / f"on-{processes}"]
        job = Job(tmp_path / "job", hf_lowrank, *words, processes=processes).done()
        assert sum("saved to" in path.read_text() for path in job.logs) == 1  # only the main process prints
    one = Statistics.load(tmp_path / "on-1")
    assert one.samples == 25
    for processes in (2, 3):
        assert_equal_up_to_order(Statistics.load(tmp_path / f"on-{processes}"), one)


def measure_share(output: Path) -> None:
    state = PartialState()
    mine = batches()[state.process_index :: state.num_processes]
    measured = compute_statistics(tiny_bert(), mine, KINDS, progress=False)
    if state.is_last_process:
        measured.save(output)


def test_processes_without_samples_take_part(tmp_path: Path) -> None:
    Job(tmp_path / "job", measure_share, tmp_path / "measured", processes=4).done()
    expected = compute_statistics(tiny_bert(), batches(), KINDS, progress=False)
    assert_equal_up_to_order(Statistics.load(tmp_path / "measured"), expected)


def numbers() -> list[dict[str, torch.Tensor]]:
    """Six samples in two batches with a number as label, hard to predict in the first and easy in the second."""
    whole = padded_batch(torch.tensor([9.0, -5.0, 7.0, 0.1, 0.2, 0.3]), lengths=(9, 8, 6, 4, 5, 7))
    return [{key: value[part] for key, value in whole.items()} for part in (slice(0, 3), slice(3, 6))]


def compress_a_regression(folder: Path) -> None:
    state, config = PartialState(), CompressionConfig(keep=0.5)
    mine = numbers()[state.process_index :: state.num_processes]
    statistics = compute_statistics(tiny_bert(num_labels=1), mine, config.needs, progress=False)
    _, report = compress(tiny_bert(num_labels=1), config, statistics, progress=False)
    write_json(folder / f"{state.process_index}.json", [statistics.curvature, report.ranks, report.expected_loss])


def test_the_curvature_of_a_regression_is_that_of_one_process(tmp_path: Path) -> None:
    """Everyone's loss counts, and a process without samples, here the third, knows that it is a squared error."""
    Job(tmp_path / "job", compress_a_regression, tmp_path, processes=3).done()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    compress_a_regression(tmp_path)
    curvature, ranks, increase = json.loads((tmp_path / "0.json").read_text())
    close = [pytest.approx(curvature, rel=1e-4), ranks, pytest.approx(increase, rel=1e-3)]
    assert found == [close] * 3


def part_differently(output: Path) -> None:
    rank = PartialState().process_index
    targets = {name: Target.of(name, nn.Linear(2, 3)) for name in "abcde"}
    sums = InputSums(["active_tokens"], targets, dict.fromkeys(targets, torch.device("cpu")))
    x, every, some = torch.randn(1, 4, 2), torch.ones(1, 4), torch.tensor([[1.0, 0, 0, 0]])
    for key, readers, largest in [
        [("first", "ab", every), ("second", "c", some), ("third", "de", every)],
        [("first", "a", some), ("second", "bc", every)],  # d and e have nothing to read
    ][rank]:
        for _ in readers:
            sums.arrive(key, tuple(readers), x, largest)
    result = sums.result()["active_tokens"]
    assert result["d"] is result["e"]
    assert len({id(total) for total in result.values()}) == 4
    if rank == 1:
        save_file({name: total.clone() for name, total in result.items()}, output)


def test_inputs_that_are_shared_on_one_process_only_are_told_apart(tmp_path: Path) -> None:
    Job(tmp_path / "job", part_differently, tmp_path / "sums", processes=2).done()
    assert {name: float(total) for name, total in load_file(tmp_path / "sums").items()} == {
        "a": 5, "b": 8, "c": 5, "d": 4, "e": 4
    }  # fmt: skip


# --- factors ---


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kfac", "tfwsvd"])
def test_factors_are_those_of_one_process_bit_for_bit(common: list[Any], tmp_path: Path, method: str) -> None:
    """In one shot: sequential ones measure once more, in sums that processes divide, and are equal to rounding."""
    kinds = ("--kind", "fisher") if method == "tfwsvd" else ()
    Job(tmp_path / "job", hf_lowrank, "statistics", *common, *kinds, "--output", tmp_path / "measured").done()
    rest = [*common, "--method", method, "--statistics", tmp_path / "measured", "--no-sequential"]
    for processes in (1, 3):
        words = ["compress", *rest, "--output", tmp_path / f"on-{processes}"]
        Job(tmp_path / "job", hf_lowrank, *words, processes=processes).done()
    assert content(tmp_path / "on-3") == content(tmp_path / "on-1")


def compress_everywhere(folder: Path) -> None:
    statistics = compute_statistics(tiny_bert(), batches(), CompressionConfig().needs, progress=False)
    model, report = compress(tiny_bert(), CompressionConfig(keep=0.5), statistics, progress=False)
    assert [layer.name for layer in report.layers] == list(statistics.weights)
    (folder / f"digest-{PartialState().process_index}").write_text(model_digest(model) + str(report.ranks))


def test_every_process_ends_with_the_same_model(tmp_path: Path) -> None:
    Job(tmp_path / "job", compress_everywhere, tmp_path, processes=2).done()
    first, second = ((tmp_path / f"digest-{rank}").read_text() for rank in range(2))
    assert first == second


def test_the_longest_work_is_given_first() -> None:
    costs = {f"layer {n}": random.Random(n).uniform(1, 10) for n in range(40)}
    for processes in (1, 2, 7):
        given = shares(costs, processes)
        assert sorted(name for names in given for name in names) == sorted(costs)
        loads = [sum(costs[name] for name in names) for names in given]
        bound = max(sum(costs.values()) / processes, max(costs.values()))
        assert max(loads) <= (4 / 3 - 1 / (3 * processes)) * bound + 1e-9
    assert shares({"a": 1.0}, 3) == [["a"], [], []]


def exchange(folder: Path) -> None:
    state = PartialState()
    solved = []

    def solve(name: str) -> Any:
        solved.append(name)
        return {"x": torch.full((2, 3), float(name), dtype=torch.bfloat16), "e": torch.zeros(0, 4)}, {"of": name}

    received = dict(divided({str(n): float(n) for n in range(1, 8)}, solve))
    assert set(received) == {str(n) for n in range(1, 8)}
    assert len(solved) < 7
    for name, (tensors, facts) in received.items():
        assert facts == {"of": name}
        assert tensors["e"].shape == (0, 4)
        assert torch.equal(tensors["x"], torch.full((2, 3), float(name), dtype=torch.bfloat16))
    with pytest.raises(LowRankError, match="said by main"):
        on_main(lambda: (_ for _ in ()).throw(LowRankError("said by main")))
    steps = list(lockstep([{"n": 1}, {"n": 2}] if state.process_index == 1 else []))
    expected = [({"n": 1}, True), ({"n": 2}, True)] if state.process_index == 1 else [({"n": 1}, False)] * 2
    assert steps == expected


def test_results_errors_and_steps_travel(tmp_path: Path) -> None:
    Job(tmp_path / "job", exchange, tmp_path, processes=3).done()


# --- models that are wrapped, sharded or offloaded ---


def measure_wrapped(output: Path) -> None:
    state = PartialState()
    model = DistributedDataParallel(tiny_bert())
    mine = batches()[state.process_index :: state.num_processes]
    statistics = compute_statistics(model, mine, CompressionConfig().needs, progress=False)
    compressed, _ = compress(model, CompressionConfig(keep=0.5), statistics, progress=False)
    assert compressed is model.module
    if state.is_main_process:
        statistics.save(output)


def measure_sharded(output: Path) -> None:
    state = PartialState()
    model = tiny_llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    texts = [padded_batch(lengths=lengths) for lengths in ((9, 7), (8, 3), (5,))]
    model(**texts[0]).loss.backward()  # as if in training
    model.zero_grad()
    mine = texts[state.process_index :: state.num_processes]  # two batches here, one there
    statistics = compute_statistics(model, mine, ["fisher", "activation_moment"], progress=False)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with pytest.raises(LowRankError, match="sharded by FSDP2"):
        compress(model, CompressionConfig("svd"), progress=False)
    if state.is_main_process:
        statistics.save(output)


def test_a_model_in_ddp_is_measured_and_compressed(tmp_path: Path) -> None:
    Job(tmp_path / "job", measure_wrapped, tmp_path / "measured", processes=2).done()
    expected = compute_statistics(tiny_bert(), batches(), CompressionConfig().needs, progress=False)
    assert_equal_up_to_order(Statistics.load(tmp_path / "measured"), expected)


def test_a_model_sharded_by_fsdp2_is_measured_where_it_is(tmp_path: Path) -> None:
    Job(tmp_path / "job", measure_sharded, tmp_path / "measured", processes=2).done()
    texts = [padded_batch(lengths=lengths) for lengths in ((9, 7), (8, 3), (5,))]
    expected = compute_statistics(tiny_llama(), texts, ["fisher", "activation_moment"], progress=False)
    assert_equal_up_to_order(Statistics.load(tmp_path / "measured"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["main memory", "disk"])
def test_offloaded_layers_come_are_solved_and_leave(tmp_path: Path, where: str) -> None:
    def offloaded() -> Any:
        here = torch.device("cpu")
        return cpu_offload(tiny_bert(), here) if where == "main memory" else disk_offload(tiny_bert(), tmp_path, here)

    model = offloaded()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    expected = compute_statistics(tiny_bert(), batches(), KINDS, progress=False)
    assert_equal_up_to_order(compute_statistics(model, batches(), KINDS, progress=False), expected)
    assert model_digest(model) == model_digest(tiny_bert())
    compressed, report = compress(model, CompressionConfig("ekfac", 0.3), expected, progress=False)
    plain, plain_report = compress(tiny_bert(), CompressionConfig("ekfac", 0.3), expected, progress=False)
    assert report.ranks == plain_report.ranks
    assert {parameter.device.type for parameter in compressed.parameters()} == {"meta"}
    assert model_digest(compressed) == model_digest(plain)
    torch.testing.assert_close(outputs(compressed), outputs(plain), rtol=1e-5, atol=1e-6)


def test_zero_3_is_refused() -> None:
    model = tiny_bert()
    model.classifier.weight.ds_id = 3
    for call in (lambda: unwrapped(model), lambda: compute_statistics(model, batches(), ["fisher"])):
        with pytest.raises(LowRankError, match="DeepSpeed ZeRO-3, which is not supported; load it without"):
            call()


# --- ends ---


def test_a_process_that_dies_ends_the_others(common: list[Any], tmp_path: Path) -> None:
    job = Job(tmp_path / "job", hf_lowrank, "compress", *common, "--output", tmp_path / "out", processes=2)
    job.until(tmp_path / "out.work/job.json").processes[1].kill()
    started = time.monotonic()
    codes = job.wait(60)
    assert codes[0] not in (0, None)
    assert codes[1] == -9
    assert time.monotonic() - started < 50
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_mistake_under_a_launcher_is_told_once(common: list[Any], tmp_path: Path) -> None:
    """With the recipe for CPUs; that it works without one is in `tests/cli/test_examples.py`."""
    recipe = ["accelerate.commands.launch", f"--config_file={ROOT / 'examples/accelerate/cpu.yaml'}"]
    bad = launch(["compress", *common, "--output", tmp_path / "out", "--method", "fsvd"], *recipe)
    printed, _ = bad.communicate(timeout=120)
    assert bad.returncode not in (0, None)
    assert printed.count("hf-lowrank: unknown method 'fsvd'") == 1


# --- the same everywhere: measured losses and times, ranks and errors ---


def refused(function: Any) -> str:
    """The one line of the LowRankError that every process gets."""
    with pytest.raises(LowRankError) as raised:
        function()
    return str(raised.value)


def measure_and_fail(folder: Path) -> None:
    """What two processes find, each with its share of the samples, and what both are told where one fails."""
    state = PartialState()
    rank, config = state.process_index, CompressionConfig("svd", keep=0.6, allocation="knapsack")
    mine = batches()[rank :: state.num_processes]
    profile = profile_losses(tiny_bert(), config, None, mine, ratios=(0.1, 0.4), progress=False)
    _, report = compress(tiny_bert(), config, profile=profile, progress=False)
    times = measured_latency([Layer((32, 64))], torch.float32, torch.device("cpu"))
    found: dict[str, Any] = {"profile": profile, "ranks": report.ranks, "seconds": times((32, 64), 8)}
    found["empty share"] = mean_loss(tiny_bert(), batches() if state.is_last_process else [])
    if state.num_processes > 1:
        found["decided"] = Work.open(folder / "work", {}).decided("ranks", lambda: {"a": rank})
        names = {str(n): 1.0 for n in range(4)}
        found["errors"] = [
            refused(lambda: list(divided(names, solve_on_main))),
            refused(lambda: compute_statistics(tiny_bert(num_labels=1), spoiled(mine), ["fisher"], progress=False)),
            refused(lambda: mean_loss(tiny_bert(), [{"input_ids": b["input_ids"]} for b in mine] if rank else mine)),
        ]
        assert on_main(lambda: "and none is out of step") == "and none is out of step"
    (folder / f"found-{rank}-of-{state.num_processes}.json").write_text(json.dumps(found))


def solve_on_main(name: str) -> Any:
    if not PartialState().is_main_process:
        raise LowRankError("a layer that cannot be solved")
    return {"x": torch.zeros(1)}, {}


def spoiled(mine: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Numbers to predict, none at all on one process."""
    far = torch.nan if PartialState().process_index == 1 else 0.0
    return [batch | {"labels": batch["labels"] + far} for batch in mine]


def test_measured_losses_ranks_and_errors_are_the_same_on_all_processes(tmp_path: Path) -> None:
    Job(tmp_path / "job", measure_and_fail, tmp_path, processes=2).done()
    measure_and_fail(tmp_path)
    first, second, alone = (
        json.loads((tmp_path / f"found-{which}.json").read_text()) for which in ("0-of-2", "1-of-2", "0-of-1")
    )
    assert first == second
    assert first["decided"] == {"a": 0}
    assert first["ranks"] == alone["ranks"]
    for name, losses in alone["profile"].items():
        assert first["profile"][name] == pytest.approx(losses, abs=1e-6)
    assert first["empty share"] == pytest.approx(alone["empty share"], abs=1e-6)
    solve, measure, labels = first["errors"]
    assert solve == "a layer that cannot be solved"
    assert "the loss is not finite for sample" in measure
    assert "the data lack the labels that it needs" in labels


@pytest.mark.slow
def test_measured_losses_do_not_split_the_processes(common: list[Any], tmp_path: Path) -> None:
    words = ["compress", *common, "--method", "svd", "--allocation", "knapsack", "--output"]
    Job(tmp_path / "job", hf_lowrank, *words, tmp_path / "two", processes=2).done()
    Job(tmp_path / "job", hf_lowrank, *words, tmp_path / "one").done()
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
def test_measured_latencies_do_not_split_the_processes(common: list[Any], tmp_path: Path) -> None:
    """On layers so wide that factors are faster on any machine, however busy."""
    wide = make_model(tmp_path / "model", hidden_size=512, intermediate_size=2048)
    words = ["compress", wide, *common[1:], "--method", "svd", "--latency", 0.8, "--align", 1, "--output"]
    Job(tmp_path / "job", hf_lowrank, *words, tmp_path / "two", processes=2).done()
    record = read_record(tmp_path / "two") or {}
    assert record["parameters_after"] < record["parameters_before"]
