"""What is told on stderr during long work, by the main process only: a bar with rate and time left, a sentence."""

import sys
from functools import cache
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm


def bar(description: str, total: int | None, unit: str, shown: bool = True) -> Any:
    """A tqdm bar counting `unit`s, silent where `shown` is off or this is not the main process."""
    return tqdm(desc=description, total=total, unit=f" {unit}", disable=not (shown and PartialState().is_main_process))


@cache
def say_once(line: str) -> None:
    """Print a sentence on stderr, the first time that it is said in this process."""
    if PartialState().is_main_process:
        print(line, file=sys.stderr)
