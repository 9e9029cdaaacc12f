"""Plain facts about a run that go into records: names and versions; never a path of this machine."""

from pathlib import Path

import torch
import transformers

import hf_lowrank


def public_name(model: str) -> str:
    """A Hub name as it is, a folder by its last part: paths of this machine do not belong in a record."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def versions() -> dict[str, str]:
    """Of this library and those that results depend on."""
    return {
        "hf_lowrank": hf_lowrank.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
