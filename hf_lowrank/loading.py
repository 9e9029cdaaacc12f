"""MODEL, a folder or a Hub name → the model and tokenizer of a task, with nothing in them made up."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks import Task


def load_model(name: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer called `name`, on this process's device.

    Half precision is computed in float32 on a CPU, which has no fast arithmetic for it, and as it is on an accelerator.

    Raises:
        LowRankError: no such model, one that cannot be read, or one without a trained head for the task.
    """
    refuse_missing(name)
    device = PartialState().device
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    try:
        model, info = task.auto_class.from_pretrained(  # safetensors only: pickled weights are never read
            name, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, safetensors its own
        raise LowRankError(f"{name} cannot be loaded as a model for {task.name}: {_first_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        bad = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise LowRankError(
            f"{name} is not trained for {task.name}: {bad[0]} is not in it or has another shape, and would be random; "
            "fine-tune it on the task first"
        )
    saved_as = (model.config.architectures or [type(model).__name__])[0]
    if saved_as.removeprefix("LowRank") != type(model).__name__.removeprefix("LowRank"):
        raise LowRankError(f"{name} is a {saved_as}, which is not a model for {task.name}")
    return model.to(device), tokenizer


def refuse_missing(name: str) -> None:
    """Raise where `name` is meant as a folder but holds no model.

    Raises:
        LowRankError: it is an existing folder without config.json, or looks like a path and does not exist.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise LowRankError(f"{name} is not a model: the folder has no config.json")
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    if looks_like_path and not path.is_dir():
        raise LowRankError(f"there is no folder {name}")


def stored_dtype(name: str) -> torch.dtype:
    """The dtype in which a model's weights are stored, float32 if its config does not say."""
    dtype = AutoConfig.from_pretrained(name).dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
