"""Whatever moment a process dies at, an output is whole, the old one or the new one, or is put back by the next run."""

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank import LowRankError
from hf_lowrank.jobs import files
from hf_lowrank.jobs.files import atomic_folder, remove_leftovers, write_json, write_text
from tests.launches import Job

CALLS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FILES = ("config.json", "model.safetensors")


class Interrupted(BaseException):
    """A signal's exception."""


def write(folder: Path, content: str) -> None:
    with atomic_folder(folder, overwrite=True) as whole:
        (whole / "code").mkdir()
        for name in (*FILES, "code/layers.py"):
            (whole / name).write_text(content)


def read(folder: Path) -> set[str] | None:
    """The contents of an output's files, which are one if it is whole; None where it is absent."""
    if not folder.exists():
        return None
    places = [folder / name for name in (*FILES, "code/layers.py")]
    return {path.read_text() if path.exists() else "no file" for path in places}


def ended_before_call(number: int, end: Callable[[], None], work: Callable[[], None]) -> bool:
    """Do `work` in a process of its own, calling `end` before its n-th change of the disk; whether it came to it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    seen = 0

    def count(event: str, arguments: Any) -> None:
        nonlocal seen
        if event in CALLS or (event == "open" and arguments[2] & WRITES):
            seen += 1
            if seen == number:
                end()

    sys.addaudithook(count)
    try:
        work()
    except Interrupted:
        os._exit(1)
    os._exit(0)


def killed() -> None:
    os.kill(os.getpid(), 9)


def interrupted() -> None:
    raise Interrupted


def replaced_through_every_crash(folder: Path, end: Callable[[], None], swaps: bool, old: bool) -> None:
    if not swaps:
        files.exchange = lambda one, other: False  # as systems other than Linux
    os.fsync = lambda descriptor: None  # which changes nothing here, and takes its time
    number, found = 0, []
    came = True
    while came:
        number += 1
        out = folder / f"{number}" / "out"
        if old:
            write(out, "old")
        came = ended_before_call(number, end, lambda out=out: write(out, "new"))  # type: ignore[misc]
        if end is interrupted or swaps or not old:  # nothing has to be put back
            assert read(out) in ({"old"}, {"new"}) or (read(out) is None and not old), (number, read(out))
        if out.parent.exists():
            remove_leftovers(out)
        assert read(out) in ({"old"}, {"new"}) or (read(out) is None and not old), (number, read(out))
        found.append(read(out))
        write(out, "third")
        assert read(out) == {"third"}
        assert os.listdir(out.parent) == ["out"]
    assert number > 15
    assert found[0] == ({"old"} if old else None)
    assert found[-1] == {"new"}


@pytest.mark.parametrize(
    ("swaps", "old"), [(True, True), (False, True), (True, False)], ids=["exchange", "two renames", "new"]
)
@pytest.mark.parametrize("end", [killed, interrupted])
def test_a_death_between_any_two_calls_loses_nothing(
    tmp_path: Path, end: Callable[[], None], swaps: bool, old: bool
) -> None:
    Job(tmp_path / "job", replaced_through_every_crash, tmp_path / "place", end, swaps, old).done()


def test_what_was_put_back_may_not_be_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out[1]"  # no pattern
    write(out, "old")
    scratch = tmp_path / ".out[1].partial-abc"
    (scratch / "whole").mkdir(parents=True)
    out.rename(scratch / files.REPLACED)
    with pytest.raises(LowRankError, match="exists and is not empty"), atomic_folder(out):
        pass
    assert read(out) == {"old"}
    assert not scratch.exists()


def test_all_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("flushed", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def noted_replace(source: Any, target: Any) -> None:
        replace(source, target)
        done.append(("moved", Path(target)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(tmp_path / "out", "new")
    moved = done.index(("moved", tmp_path / "out"))
    before = {"/".join(path.parts[path.parts.index("whole") :]) for kind, path in done[:moved] if kind == "flushed"}
    assert before == {"whole", "whole/code", "whole/code/layers.py", "whole/config.json", "whole/model.safetensors"}
    assert done[moved + 1] == ("flushed", tmp_path)
    done.clear()
    write_json(tmp_path / "record.json", {})
    scratch = tmp_path / ".record.json.partial"
    assert done == [("flushed", scratch), ("moved", tmp_path / "record.json"), ("flushed", tmp_path)]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "out") as whole:
            (whole / "code").mkdir(mode=0o700)
            for name in ("model.safetensors", "code/layers.py"):
                os.close(os.open(whole / name, os.O_CREAT | os.O_WRONLY, 0o600))
        write_text(tmp_path / "out" / "README.md", "")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    folder, file = 0o777 & ~mask, 0o666 & ~mask
    assert modes == {"out": folder, "code": folder, "model.safetensors": file, "layers.py": file, "README.md": file}


def test_a_link_to_a_folder_is_written_through(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink()
    assert read(tmp_path / "disk" / "real") == {"new"}
    assert os.listdir(tmp_path / "disk") == ["real"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def save() -> None:
        with atomic_folder(tmp_path / "out") as whole:
            (whole / "mine").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").touch()

    with pytest.raises(LowRankError, match="exists and is not empty"):
        save()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]
