"""Plain facts about a run that go into records: names and versions; never a path of this machine."""

from pathlib import Path, PureWindowsPath

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import hf_lowrank


def public_name(model: str) -> str:
    """A Hub name as it is, a folder by its last part: paths of this machine do not belong in a record.

    What no Hub name can be was a folder, even if it is gone.
    """
    if Path(model).is_dir():
        return Path(model).resolve().name
    try:
        validate_repo_id(model)
    except HFValidationError:
        return PureWindowsPath(model).name
    return model


def versions() -> dict[str, str]:
    """Of this library and those that results depend on."""
    return {
        "hf_lowrank": hf_lowrank.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
