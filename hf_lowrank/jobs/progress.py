"""What is told on stderr during long work, by the main process only: a bar on a terminal, now and then a line
in a file or a pipe; a sentence."""

import sys
import time
from functools import cache
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

SECONDS = 30.0  # between two lines


def bar(description: str, total: int | None, unit: str, shown: bool = True) -> Any:
    """A context that counts `unit`s by `update(n=1)`, silent where `shown` is off or this is not the main process."""
    shown = shown and PartialState().is_main_process
    if shown and not sys.stderr.isatty():
        return _Lines(description, total, unit)
    return tqdm(desc=description, total=total, unit=f" {unit}", disable=not shown)


class _Lines:
    """As far as it is used, a tqdm bar that writes a whole line at most every `SECONDS`, and none for short work."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.n, self.note, self.started = 0, "", time.monotonic()
        self.told = self.started

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.told < SECONDS:
            return
        self.told = now
        of = "" if self.total is None else f" of {self.total:,}"
        note = f", {self.note}" if self.note else ""
        print(f"{self.description}: {self.n:,}{of} {self.unit}, {now - self.started:.0f} s{note}", file=sys.stderr)

    def set_postfix_str(self, note: str) -> None:
        self.note = note

    def close(self) -> None:
        pass

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


@cache
def say_once(line: str) -> None:
    """Print a sentence on stderr, the first time that it is said in this process."""
    if PartialState().is_main_process:
        print(line, file=sys.stderr)
