"""A compressed model and the record of its making → a folder that from_pretrained loads."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.files import atomic_folder, read_json, write_json
from hf_lowrank.report import CompressionReport

RECORD = "compression.json"


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: CompressionReport,
    folder: str | Path,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    **facts: Any,
) -> None:
    """Write the model, its tokenizer and `compression.json` into a new folder, all of it or nothing.

    The weights are stored in `dtype`, or as they are. `facts` (the base model's name, scores, …) join the report in
    the record.

    Raises:
        LowRankError: the folder exists and `overwrite` is off.
    """
    with atomic_folder(folder, overwrite) as whole:
        if dtype is not None:
            nn.Module.to(model, dtype)
        model.save_pretrained(whole)
        if tokenizer is not None:
            tokenizer.save_pretrained(whole)
        write_json(whole / RECORD, {**facts, **report.to_dict()})


def add_facts(folder: str | Path, **facts: Any) -> None:
    """Add to the record of a saved model what was found out later."""
    path = Path(folder) / RECORD
    write_json(path, {**read_json(path), **facts})


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record that `save_compressed` wrote, or None where a folder has none."""
    path = Path(folder) / RECORD
    return read_json(path) if path.is_file() else None
