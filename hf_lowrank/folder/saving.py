"""A compressed model and the record of its making → a folder that from_pretrained loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.compression.directions import Directions
from hf_lowrank.compression.report import CompressionReport
from hf_lowrank.folder.card import card_facts, rendered_as, weights_bytes, write_card
from hf_lowrank.folder.directions import save_directions
from hf_lowrank.folder.earlier import of_original
from hf_lowrank.folder.fingerprint import fingerprint
from hf_lowrank.folder.packing import quiet
from hf_lowrank.folder.sentences import copy_modules
from hf_lowrank.jobs.files import atomic_folder, read_json, write_json
from hf_lowrank.model.blocks import is_on_disk, shard_bytes
from hf_lowrank.model.checks import refuse_adapter
from hf_lowrank.model.weights import read_as
from hf_lowrank.nn.modeling_lowrank import LowRankMixin
from hf_lowrank.nn.publishing_lowrank import RECORD


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
    the record. Of a model that came compressed already they are brought to the dense original (see `of_original`).

    Raises:
        LowRankError: the folder exists and `overwrite` is off.
    """
    report, facts = of_original(report, facts, model.name_or_path)
    record = {**facts, **report.to_dict()}
    save_model(model, tokenizer, folder, overwrite, dtype, record, report.directions)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    record: dict[str, Any] | None = None,
    directions: Mapping[str, Directions] | None = None,
) -> None:
    """As `save_compressed`, for any model, with a record that is complete, or None; `directions` of its factors.

    Raises:
        LowRankError: as `save_compressed`; the model has an adapter, which alone would be saved.
    """
    refuse_adapter(model)
    with atomic_folder(folder, overwrite) as whole, quiet(model.config):
        if dtype is not None:
            nn.Module.to(model, dtype)
            read_as(model, dtype)
        with catch_warnings():
            filterwarnings("ignore", "Attempting to save a model with offloaded modules")  # one shard at a time
            size: Any = {"max_shard_size": shard_bytes(model)} if is_on_disk(model) else {}
            model.save_pretrained(whole, **size)
        if tokenizer is not None:
            tokenizer.save_pretrained(whole)
        copy_modules(model, whole)
        save_directions(directions or {}, model, whole)
        if record is not None:
            record = {**record, "fingerprint": fingerprint(model, whole)}
            if isinstance(model, LowRankMixin):
                record = {**card_facts(model), **_reader(tokenizer), **record}
                record["weights_bytes"] = weights_bytes(whole)
                write_card(whole, record, Path(folder).resolve().name)
            write_json(whole / RECORD, record)


def _reader(tokenizer: Any) -> dict[str, bool]:
    """What reads the inputs of a saved model, for its record."""
    images = isinstance(tokenizer, BaseImageProcessor)
    return {"image_processor": True} if images else {"tokenizer": tokenizer is not None}


def add_facts(folder: str | Path, **facts: Any) -> None:
    """Add to the record of a saved model what was found out later, and to its card unless somebody has edited that."""
    path = Path(folder) / RECORD
    before = read_json(path)
    name = rendered_as(folder, before)
    write_json(path, {**before, **facts})
    if name is not None:
        write_card(folder, {**before, **facts}, name)


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record that `save_compressed` wrote, or None where a folder has none."""
    path = Path(folder) / RECORD
    return read_json(path) if path.is_file() else None
