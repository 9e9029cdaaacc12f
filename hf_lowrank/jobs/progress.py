"""Progress of long work: a bar with rate and time left, drawn by the main process only."""

from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm


def bar(description: str, total: int | None, unit: str, shown: bool = True) -> Any:
    """A tqdm bar counting `unit`s, silent where `shown` is off or this is not the main process."""
    return tqdm(desc=description, total=total, unit=f" {unit}", disable=not (shown and PartialState().is_main_process))
