"""Plain facts about a run that go into records: names, origins, versions; never a path of this machine."""

from pathlib import Path
from typing import Any

import torch
import transformers

import hf_lowrank
from hf_lowrank.tasks import Task


def public_name(model: str) -> str:
    """A Hub name as it is, a folder by its last part: paths of this machine do not belong in a record."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def origin(model: str, task: Task, data_dir: Path | None, seed: int) -> dict[str, Any]:
    """What statistics were measured on."""
    data = task.hub[0] if data_dir is None else data_dir.resolve().name
    return {"model": public_name(model), "task": task.name, "data": data, "split": "train", "seed": seed}


def versions() -> dict[str, str]:
    """Of this library and those that results depend on."""
    return {
        "hf_lowrank": hf_lowrank.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
