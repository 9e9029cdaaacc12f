"""A job that is killed, stopped or out of room goes on to the same bits; what is not its own, or damaged, is named."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lowrank import LowRankError
from hf_lowrank.jobs.checkpoint import Store, Work
from hf_lowrank.jobs.interrupts import Stopped, ending_in_order, undivided
from tests.fault_injection import Injection
from tests.launches import Job, content, hf_lowrank, launch, make_data, make_model, wait_for


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What all commands on a tiny model have in common."""
    folder = tmp_path_factory.mktemp("tiny")
    rest = ["--task", "cola", "--data-dir", make_data(folder / "data", 120), "--batch-size", 2]
    return ["compress", make_model(folder / "model"), *rest, "--checkpoint-minutes", 0]


@pytest.fixture(scope="module")
def undisturbed(common: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a job without a break ends with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Job(folder / "job", hf_lowrank, *common, "--output", folder / "out").done()
    return content(folder / "out")


def stopped_at(file: str, number: int, words: list[Any], out: Path, processes: int = 1) -> Job:
    """The job after a signal, sent when a file of its work is there."""
    job = Job(out.parent / "job", hf_lowrank, *words, "--output", out, processes=processes)
    job.until(out.with_name(f"{out.name}.work") / file).kill(number)
    job.wait()
    return job


def resumed(words: list[Any], out: Path, processes: int = 1) -> dict[str, Any]:
    Job(out.parent / "job", hf_lowrank, *words, "--output", out, "--resume", processes=processes).done()
    assert [path.name for path in out.parent.iterdir() if out.name in path.name] == [out.name]  # nothing is left behind
    return content(out)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_few_kills(tmp_path: Path, processes: int) -> None:
    """The short form of tests/fault_injection.py."""
    completed, places = Injection(tmp_path, seed=3, processes=processes).run(kills=3)
    assert completed >= 1
    assert len(places) == 3


SUMS = "sums-1/process-0-of-1.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_in_order_and_nothing_is_lost(
    common: list[Any], undisturbed: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    job = stopped_at(SUMS, number, common, tmp_path / "out")
    assert [process.exitcode for process in job.processes] == [128 + number]
    said = f"hf-lowrank: stopped by {number.name}; what is done is kept in {tmp_path}/out.work"
    assert job.printed().count(said) == 1
    assert "Traceback" not in job.printed()
    facts = Store(tmp_path / "out.work/sums-1").load("process-0-of-1")[1]
    assert 0 < facts["batches"] <= 60
    assert resumed(common, tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_factors_go_on_with_another_number_of_processes(common: list[Any], tmp_path: Path) -> None:
    """Of one shot: what sequential ones are found from is added up by the processes, and rounded otherwise."""
    words = [*common, "--no-sequential"]
    Job(tmp_path / "job", hf_lowrank, *words, "--output", tmp_path / "whole").done()
    stopped_at("ranks.json", signal.SIGKILL, words, tmp_path / "out")
    assert resumed(words, tmp_path / "out", processes=3) == content(tmp_path / "whole")


@pytest.mark.slow
def test_statistics_do_not_go_on_with_other_shares(common: list[Any], tmp_path: Path) -> None:
    stopped_at(SUMS, signal.SIGKILL, common, tmp_path / "out")
    words = [*common, "--output", tmp_path / "out", "--resume"]
    job = Job(tmp_path / "again", hf_lowrank, *words, processes=2)
    assert job.wait()[0] == 2
    assert "the statistics were begun by 1 process(es), each with its share" in job.printed()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", 1], "seed was 0 and is 1"),
        (["--batch-size", 4], "settings.batch_size was 2 and is 4"),
        (["--rank-ratio", 0.5], "settings.rank_ratio was 0.33 and is 0.5"),
        (["--samples", 100], "data was"),
        (["MODEL"], "model was"),
    ],
)
def test_what_differs_is_named(
    common: list[Any], tmp_path: Path, change: list[Any], said: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stopped_at(SUMS, signal.SIGKILL, common, tmp_path / "out")
    words = [*common, *change] if change != ["MODEL"] else [*common[:1], other_model(common[1], tmp_path), *common[2:]]
    job = Job(tmp_path / "again", hf_lowrank, *words, "--output", tmp_path / "out", "--resume")
    assert job.wait() == [2]
    assert "out.work holds the work of another job: " in job.printed()
    assert said in job.printed()


def other_model(model: Path, folder: Path) -> Path:
    """A copy with one embedding changed: not a layer that is factorized."""
    copy = folder / "other"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(copy / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][5, 0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.slow
def test_work_is_neither_forgotten_nor_overwritten(
    common: list[Any], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped_at("factors", signal.SIGKILL, common, out)
    job = Job(tmp_path / "again", hf_lowrank, *common, "--output", out)
    assert job.wait() == [2]
    assert "holds unfinished work; continue it with --resume or drop it with --overwrite" in job.printed()
    Job(tmp_path / "again", hf_lowrank, *common, "--output", out, "--overwrite").done()
    assert content(out) == undisturbed
    (tmp_path / "mine.work").mkdir()
    (tmp_path / "mine.work/thesis.txt").write_text("not a job's work")
    job = Job(tmp_path / "mine", hf_lowrank, *common, "--output", tmp_path / "mine", "--overwrite")
    assert job.wait() == [2]
    assert "mine.work, the place for unfinished work, is in use" in job.printed()
    assert (tmp_path / "mine.work/thesis.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_second_run_leaves_the_first_in_peace(
    common: list[Any], undisturbed: dict[str, Any], tmp_path: Path, flag: str
) -> None:
    out = tmp_path / "out"
    first = Job(tmp_path / "job", hf_lowrank, *common, "--output", out)
    first.until(tmp_path / "out.work" / SUMS)
    first.kill(signal.SIGSTOP)  # so that it is still there
    second = Job(tmp_path / "second", hf_lowrank, *common, "--output", out, flag, processes=2)
    assert second.wait() == [2, 2]
    assert f"out is in use by process {first.processes[0].pid} on" in second.printed()
    first.kill(signal.SIGCONT)
    first.done()
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.parametrize("damage", ["truncated", "a bit", "facts"])
def test_damaged_results_are_named(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.save("layer.0", ({"up": torch.randn(4, 2), "down": torch.randn(2, 8)}, {"error": 0.25}))
    tensors, facts = store.load("layer.0")
    assert tensors["up"].shape == (4, 2)
    assert facts == {"error": 0.25}
    path = store.path("layer.0")
    content = path.read_bytes()
    changed = {
        "truncated": content[:-9],
        "a bit": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
        "facts": content.replace(b"0.25", b"0.26"),
    }
    path.write_bytes(changed[damage])
    with pytest.raises(LowRankError, match=r"layer\.0\.safetensors is damaged \(.*delete this file and resume"):
        store.load("layer.0")


def test_a_single_number_is_kept_whatever_its_stride(tmp_path: Path) -> None:
    """As of a layer of one output, whose moment has a diagonal of one number."""
    number = torch.full((1, 1), 3.0).diagonal()
    assert number.stride() == (2,)
    Store(tmp_path).save("gate", ({"outputs": number}, {}))
    assert torch.equal(Store(tmp_path).load("gate")[0]["outputs"], number)


@pytest.mark.slow
def test_a_damaged_file_is_named_and_its_loss_costs_only_itself(
    common: list[Any], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped_at("factors", signal.SIGKILL, common, out)
    stopped_at("saving", signal.SIGKILL, [*common, "--resume"], out)
    damaged = next((tmp_path / "out.work/factors").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-3])
    job = Job(tmp_path / "again", hf_lowrank, *common, "--output", out, "--resume")
    assert job.wait() == [2]
    assert f"{damaged} is damaged" in job.printed()
    damaged.unlink()
    assert resumed(common, out) == undisturbed


def limited(limit: int, words: list[Any]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    hf_lowrank(*words)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000])
def test_no_room_is_one_line_and_nothing_half_written(
    common: list[Any], undisturbed: dict[str, Any], tmp_path: Path, limit: int
) -> None:
    out = tmp_path / "out"
    job = Job(tmp_path / "job", limited, limit, [*common, "--output", out])
    assert job.wait() == [2], job.printed()
    assert "cannot be written: File too large" in job.printed()
    assert "Traceback" not in job.printed()
    assert not out.exists()
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    assert resumed(common, out) == undisturbed


def test_a_signal_waits_for_the_end_of_a_step() -> None:
    steps = []

    def take_steps(*signals: int) -> None:
        with undivided():
            for number in signals:
                signal.raise_signal(number)
            steps.append("whole")
        steps.append("never")

    with pytest.raises(Stopped, match="stopped by SIGTERM") as stop, ending_in_order():
        take_steps(signal.SIGTERM, signal.SIGTERM)  # launchers send several
    assert steps == ["whole"]
    assert stop.value.number == signal.SIGTERM
    with pytest.raises(Stopped, match="SIGTERM"), ending_in_order():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ending_in_order():
        take_steps(signal.SIGINT, signal.SIGINT)  # someone means it
    assert steps == ["whole"]


def test_work_of_a_library_user(tmp_path: Path) -> None:
    work = Work.open(tmp_path / "work", {"model": "a", "seed": 0})
    assert work.decided("ranks", lambda: {"x": 3, "y": None}) == {"x": 3, "y": None}
    again = Work.open(tmp_path / "work", {"seed": 0, "model": "a"}, resume=True)
    assert again.decided("ranks", dict) == {"x": 3, "y": None}
    with pytest.raises(LowRankError, match="model was a and is b; seed was 0 and is None"):
        Work.open(tmp_path / "work", {"model": "b"}, resume=True)
    again.remove()
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def undisturbed_by_two(common: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    Job(folder / "job", hf_lowrank, *common, "--output", folder / "out", processes=2).done()
    return content(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM", "a worker is killed"])
def test_real_launchers_end_and_go_on(
    common: list[Any], undisturbed_by_two: dict[str, Any], tmp_path: Path, end: str
) -> None:
    out = tmp_path / "out"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    running = launch([*common, "--output", out], *launcher)
    wait_for(tmp_path / "out.work/sums-1/process-1-of-2.safetensors")
    if end == "Ctrl-C":  # of a terminal: to all
        os.killpg(running.pid, signal.SIGINT)
    elif end == "SIGTERM":  # of a scheduler: to the launcher
        running.send_signal(signal.SIGTERM)
    else:
        psutil.Process(running.pid).children()[1].kill()
    printed, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    if end != "a worker is killed":  # then the launcher, or the broken connection, ends the other one
        assert printed.count("hf-lowrank: stopped by SIG") == 1, printed
    if end == "Ctrl-C":  # once by a launcher; starting one takes longer than all the rest
        again = launch([*common, "--output", out, "--resume"], *launcher)
        printed, _ = again.communicate(timeout=100)
        assert again.returncode == 0, printed
        assert content(out) == undisturbed_by_two
    else:
        assert resumed(common, out, processes=2) == undisturbed_by_two
