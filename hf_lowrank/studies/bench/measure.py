"""A call → its seconds, in turns with another; its arithmetic; the memory it takes at its peak."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], Any]


def seconds_in_turns(calls: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call in every round, taken in turn (A B A B …), after two rounds that are not counted.

    In turns all are under the same conditions, so that ratios within a round are fair on a shared machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
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


def _attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Operations of softmax(query keyᵀ) value, of shapes [batch, heads, tokens, width]; keys may be shared by heads."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * (width + value[-1])


# The CPU's attention kernel, which the counter does not know.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def operations(call: Call) -> int:
    """Floating-point operations of the matrix products and the attention of one call."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        call()
    return counter.get_total_flops()


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes that PyTorch holds at the peak of one call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notices on stderr are of no use to anybody here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
