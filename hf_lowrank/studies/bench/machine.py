"""Facts about the machine and libraries that a measured time depends on."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def machine_facts(device: torch.device | None = None) -> dict[str, Any]:
    """What a measured time depends on, as plain JSON values; with the name of the accelerator if `device` is one."""
    facts = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device is not None and device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
