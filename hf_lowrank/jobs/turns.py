"""Calls → the seconds that each takes, in turns, so that all meet the same conditions on a shared machine."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Call = Callable[[], Any]
Name = TypeVar("Name")


def seconds_in_turns(calls: Mapping[Name, Call], rounds: int, device: torch.device) -> dict[Name, list[float]]:
    """Seconds of every call in every round, taken in turn (A B A B …), after two rounds that are not counted.

    Ratios within a round are fair on a shared machine.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(-2, rounds):
        for name, call in calls.items():
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
