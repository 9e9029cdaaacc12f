"""A compressed model and the record of its making → a folder that from_pretrained loads."""

from pathlib import Path
from typing import Any

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
    **facts: Any,
) -> None:
    """Write the model, its tokenizer and `compression.json` into a new folder, all of it or nothing.

    `facts` (the base model's name, scores, …) join the report in the record.

    Raises:
        LowRankError: the folder exists and `overwrite` is off.
    """
    with atomic_folder(folder, overwrite) as whole:
        model.save_pretrained(whole)
        if tokenizer is not None:
            tokenizer.save_pretrained(whole)
        write_json(whole / RECORD, {**facts, **report.to_dict()})


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record that `save_compressed` wrote, or None where a folder has none."""
    path = Path(folder) / RECORD
    return read_json(path) if path.is_file() else None
