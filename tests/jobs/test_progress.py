"""Progress: a bar on a terminal, a line now and then in a file, nothing where it is not wanted."""

import fcntl
import os
import pty
import struct
import sys
import termios
import time
from typing import Any

import pytest

from hf_lowrank.jobs import progress


def work(seconds: list[float], total: int | None = 100, shown: bool = True) -> None:
    """Count a unit at each of these times."""
    clock = iter([0.0, *seconds])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        with progress.bar("measuring", total, "samples", shown) as bar:
            for _ in seconds:
                bar.update()


def test_a_file_gets_a_line_now_and_then(capfd: Any) -> None:
    work([float(second) for second in range(1, 101)])
    assert capfd.readouterr().err.splitlines() == [
        "measuring: 30 of 100 samples, 30 s",
        "measuring: 60 of 100 samples, 60 s",
        "measuring: 90 of 100 samples, 90 s",
    ]


def test_short_work_is_silent_in_a_file(capfd: Any) -> None:
    work([n / 10 for n in range(200)])
    work([10.0, 40.0], shown=False)
    assert capfd.readouterr().err == ""


def test_what_has_no_end_is_counted(capfd: Any) -> None:
    clock = iter([0.0, 31.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        with progress.bar("searching", None, "models") as bar:
            bar.set_postfix_str("keep 0.5: 81.2")
            bar.update()
    assert capfd.readouterr().err == "searching: 1 models, 31 s, keep 0.5: 81.2\n"


def test_a_terminal_gets_a_bar(monkeypatch: Any) -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress.bar("measuring", 2, "samples") as bar:
            bar.update(2)
        shown = os.read(parent, 4096).decode()
    assert "measuring:" in shown
    assert "0/2" in shown
