"""What a command measures on, for the record."""

from pathlib import Path
from typing import Any

from hf_lowrank.folder.facts import public_name, versions
from hf_lowrank.tasks import Task

__all__ = ["origin", "public_name", "versions"]


def origin(model: str, task: Task, data_dir: Path | None, seed: int) -> dict[str, Any]:
    """What statistics were measured on."""
    data = task.hub[0] if data_dir is None else data_dir.resolve().name
    return {"model": public_name(model), "task": task.name, "data": data, "split": "train", "seed": seed}
