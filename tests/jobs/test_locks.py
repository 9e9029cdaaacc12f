"""One job at a time writes an output: the second is refused before it touches anything, a dead one's lock is free."""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank import LowRankError
from hf_lowrank.jobs.distributed import held_for_all
from hf_lowrank.jobs.files import atomic_folder
from hf_lowrank.jobs.locks import locked
from tests.launches import Job


def hold(output: Path, sign: Path) -> None:
    with locked(output):
        sign.touch()
        time.sleep(60)


def holding(tmp_path: Path, output: Path) -> Job:
    return Job(tmp_path / "job", hold, output, tmp_path / "sign").until(tmp_path / "sign")


def test_the_holder_is_named_and_a_killed_ones_lock_is_free(tmp_path: Path) -> None:
    job = holding(tmp_path, out := tmp_path / "far" / "out")
    said = f"out is in use by process {job.processes[0].pid} on {socket.gethostname()}: wait for its end, or stop it"
    with pytest.raises(LowRankError, match=said), locked(out):
        pass
    with pytest.raises(LowRankError, match=said), atomic_folder(out, overwrite=True):
        pass
    with locked(tmp_path / "far" / "out2"):
        pass
    job.kill()
    job.wait()
    assert os.listdir(tmp_path / "far") == [".out.lock"]
    with locked(out):
        assert json.loads((tmp_path / "far/.out.lock").read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path / "far") == []


def test_a_link_is_the_folder_that_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    holding(tmp_path, tmp_path / "link")
    with pytest.raises(LowRankError, match="real is in use by process"), locked(tmp_path / "real"):
        pass


def count_alone(folder: Path) -> None:
    """Add 1 to a number, fifty times, each time alone."""
    done = 0
    while done < 50:
        try:
            with locked(folder / "out"):
                number = int((folder / "number").read_text())
                time.sleep(0.0002)
                (folder / "number").write_text(str(number + 1))
                done += 1
        except LowRankError:
            time.sleep(0.0002)


def test_removing_the_file_lets_nobody_in_beside_another(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    jobs = [Job(tmp_path / f"job{n}", count_alone, tmp_path) for n in range(4)]
    for job in jobs:
        job.done()
    assert (tmp_path / "number").read_text() == "200"


def test_within_a_thread_it_is_held_once(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path / "out"):
                pass
        except LowRankError as error:
            refused.append(str(error))

    with locked(tmp_path / "out") as first, locked(tmp_path / "out") as second:
        assert (first, second) == (True, False)
    with locked(tmp_path / "out"):
        with locked(tmp_path / "out"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1


def claim(output: Path, sign: Path) -> None:
    with held_for_all(output):
        sign.with_name(f"{sign.name}{os.environ['RANK']}").touch()


def test_the_processes_of_a_job_hold_it_together(tmp_path: Path) -> None:
    Job(tmp_path / "job", claim, tmp_path / "out", tmp_path / "sign", processes=2).done()
    assert sorted(path.name for path in tmp_path.glob("sign*")) == ["sign0", "sign1"]
    other = holding(tmp_path, tmp_path / "out")
    job = Job(tmp_path / "job", claim, tmp_path / "out", tmp_path / "again", processes=2)
    assert job.wait() == [1, 1]
    assert job.printed().count(f"out is in use by process {other.processes[0].pid} on") == 2
    assert not list(tmp_path.glob("again*"))


PLACES = {
    "/proc/out": "/proc/out cannot be written: No such file or directory; choose another place",
    "FILE/out": "file/out cannot be written: File exists; choose another place",
    "FILE/far/out": "file/far/out cannot be written: Not a directory; choose another place",
    "x" * 252: "cannot be written: File name too long; choose another place",
}


@pytest.mark.parametrize("place", PLACES, ids=["proc", "file", "below a file", "long"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LowRankError, match=PLACES[place]), locked(tmp_path / place.replace("FILE", "file")):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def as_nobody(folder: Path) -> None:
    """What a user meets who may read and not write."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    for place in ("out", "full"):
        with pytest.raises(LowRankError, match=f"{place} cannot be written: Permission denied"), locked(folder / place):
            pass
    with locked(folder / "mine"):  # where nobody can replace it
        assert os.listdir(folder / "mine") == [".lock"]
    assert os.listdir(folder / "mine") == []


def test_without_the_right_to_write_it_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "readable"
    for part, mode in (("full", 0o555), ("mine", 0o777)):
        (folder / part).mkdir(parents=True)
        (folder / part).chmod(mode)
    folder.chmod(0o555)
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o711)
    try:
        Job(tmp_path / "job", as_nobody, folder).done()
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("process", "host", "held"),
    [(os.getpid(), socket.gethostname(), True), (2**22 + 1, socket.gethostname(), False), (1, "elsewhere", True)],
    ids=["alive", "dead", "on another host"],
)
def test_without_locks_of_the_system_the_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: int, host: str, held: bool
) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr(fcntl, "flock", none)
    path = tmp_path / ".out.lock"
    path.write_text(json.dumps({"process": process, "host": host}))
    if held:
        with pytest.raises(LowRankError, match=f"in use by process {process} on {host}"), locked(tmp_path / "out"):
            pass
        assert path.exists()
    else:
        with locked(tmp_path / "out"):
            pass
        assert not path.exists()
