"""SIGTERM and Ctrl-C → the end of a job in order: the step at hand is finished and what is done is kept."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

MINUTES = 5.0  # between two checkpoints of a pass over the data: what a crash without a signal may cost

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class _State:
    """What a handler of signals must know of its process, of which there is one.

    Args:
        steps: undivided ones that are being done, one within the other.
        first: the signal that asked the job to end.
        kept: where its unfinished work can be resumed from.
    """

    steps: int = 0
    first: int | None = None
    kept: Path | None = None


_state = _State()


class Stopped(BaseException):
    """A signal has asked the job to end."""

    def __init__(self, number: int) -> None:
        kept = f"; what is done is kept in {_state.kept}, and --resume goes on from there" if _state.kept else ""
        super().__init__(f"stopped by {signal.Signals(number).name}{kept}")
        self.number = number


def kept_in(folder: Path | None) -> None:
    """From now on, work that is stopped can be resumed from `folder`."""
    _state.kept = folder


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C raise `Stopped`, at the end of an `undivided` step; a second Ctrl-C at once.

    Launchers pass one Ctrl-C on as SIGTERM, so that a further SIGTERM means nothing new.
    """
    before: dict[int, Any] = {number: signal.signal(number, _arrived) for number in _SIGNALS}
    try:
        yield
    finally:
        _state.first = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undivided() -> Iterator[None]:
    """A step that a signal does not cut in two."""
    _state.steps += 1
    try:
        yield
    finally:
        _state.steps -= 1
    if _state.first is not None and not _state.steps:
        raise Stopped(_state.first)


def _arrived(number: int, frame: FrameType | None) -> None:
    if _state.first is not None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        return
    _state.first = number
    if not _state.steps:
        raise Stopped(number)
