"""Memory that was freed → back to the system, where the allocator of C would keep it for later."""

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """`malloc_trim` of glibc; other allocators have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Let the system have what this process has freed: tensors of up to 32 MB leave holes that stay resident."""
    if (trim := _trim()) is not None:
        trim(0)
