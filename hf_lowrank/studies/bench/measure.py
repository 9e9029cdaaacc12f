"""A call → its arithmetic; the memory it takes at its peak; a model → that of its weights."""

import math
import os
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from hf_lowrank.jobs.turns import Call


def _attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Operations of softmax(query keyᵀ) value, of shapes [batch, heads, tokens, width]; keys may be shared by heads."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * (width + value[-1])


def _product(left: Any, right: Any, *rest: Any, **options: Any) -> int:
    """Operations of [tokens, in] @ [in, out], of integers."""
    return 2 * left[0] * left[1] * right[1]


def _bitsandbytes(inputs: Any, codes: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """Operations of [..., in] and a weight [out, in], of integers."""
    return 2 * math.prod(inputs) * weight[0]


def _unknown_products() -> dict[Any, Any]:
    """What the counter does not know: the CPU's attention kernel, and the products of quantizers' libraries."""
    known = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._int_mm: _product,  # torchao's
    }
    with suppress(AttributeError):  # bitsandbytes is not imported
        known[torch.ops.bitsandbytes.int8_mixed_scaled_mm] = _bitsandbytes
    return known


def operations(call: Call) -> int:
    """Operations of the matrix products and the attention of one call, on numbers of any precision."""
    with FlopCounterMode(display=False, custom_mapping=_unknown_products()) as counter:
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


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(map(_held, (*model.parameters(), *model.buffers())))


def _held(tensor: Any) -> int:
    """Bytes of a tensor, of torchao's those of the tensors within, such as codes and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return int(tensor.nbytes)
    return sum(_held(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
