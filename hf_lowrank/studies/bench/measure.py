"""A call → its arithmetic; the memory it takes at its peak."""

import os
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_lowrank.jobs.turns import Call


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
