"""SIGTERM and Ctrl-C → the end of a job in order: the step at hand is finished and what is done is kept."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

MINUTES = 5.0  # between two checkpoints of a pass over the data: what a crash without a signal may cost

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_undivided = 0
_first: int | None = None
_kept: Path | None = None


class Stopped(BaseException):
    """A signal has asked the job to end."""

    def __init__(self, number: int) -> None:
        kept = f"; what is done is kept in {_kept}, and --resume goes on from there" if _kept is not None else ""
        super().__init__(f"stopped by {signal.Signals(number).name}{kept}")
        self.number = number


def kept_in(folder: Path | None) -> None:
    """From now on, work that is stopped can be resumed from `folder`."""
    global _kept
    _kept = folder


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C raise `Stopped`, at the end of an `undivided` step; a second Ctrl-C at once.

    Launchers pass one Ctrl-C on as SIGTERM, so that a further SIGTERM means nothing new.
    """
    global _first
    before: dict[int, Any] = {number: signal.signal(number, _arrived) for number in _SIGNALS}
    try:
        yield
    finally:
        _first = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undivided() -> Iterator[None]:
    """A step that a signal does not cut in two."""
    global _undivided
    _undivided += 1
    try:
        yield
    finally:
        _undivided -= 1
    if _first is not None and not _undivided:
        raise Stopped(_first)


def _arrived(number: int, frame: FrameType | None) -> None:
    global _first
    if _first is not None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        return
    _first = number
    if not _undivided:
        raise Stopped(number)
