"""What the directions of a model's layers are worth ↔ `directions.safetensors` beside its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.allocation.budget import BUDGETS
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.directions import PARTS, Directions
from hf_lowrank.compression.report import AFTERWARDS, CompressionReport
from hf_lowrank.compression.shrink import shrink
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import stored
from hf_lowrank.folder.reading import load_low_rank
from hf_lowrank.jobs.files import read_json
from hf_lowrank.model.checks import check_model, quantizer_of
from hf_lowrank.model.weights import digest
from hf_lowrank.nn.publishing_lowrank import RECORD

DIRECTIONS = "directions.safetensors"


def save_directions(directions: Mapping[str, Directions], model: PreTrainedModel, folder: Path) -> None:
    """Write them, with a digest of the factors that each belongs to; not of a quantized model, which cannot shrink.

    Those of one layer at a time are in memory: they are written one after the other, and the file is made of that.
    """
    if directions and quantizer_of(model) is None:
        digests = {name: digest(model.get_submodule(name)) for name in sorted(directions)}  # not as they were solved
        raw = folder / f"{DIRECTIONS}.raw"
        try:
            save_file(_on_disk(directions, raw), folder / DIRECTIONS, {"digests": json.dumps(digests)})
        finally:
            raw.unlink(missing_ok=True)


def _on_disk(directions: Mapping[str, Directions], path: Path) -> dict[str, Tensor]:
    """The tensors of directions as parts of one file, which is not read into memory."""
    places: dict[str, tuple[int, int, torch.dtype, torch.Size]] = {}
    with path.open("wb") as file:
        for name in directions:
            for part, tensor in vars(directions[name]).items():
                content = tensor.contiguous().cpu()
                file.write(b"\0" * (-file.tell() % 8))  # so that it can be seen as its dtype
                places[f"{name}.{part}"] = (file.tell(), content.nbytes, content.dtype, content.shape)
                file.write(content.flatten().view(torch.uint8).numpy().data)
    whole = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    return {
        name: whole[start : start + size].view(dtype).view(shape)
        for name, (start, size, dtype, shape) in places.items()
    }


def load_directions(model: PreTrainedModel, name: str) -> dict[str, Directions]:
    """Those of the model that was loaded from a folder or Hub name.

    Raises:
        LowRankError: there are none, they cannot be read, or the factors are no longer those that they belong to.
    """
    path = stored(name, DIRECTIONS)
    if path is None:
        raise LowRankError(f"{name} {_without(name)}: what its directions are worth is not known, compress anew")
    try:
        with safe_open(path, "pt") as file:
            digests = json.loads((file.metadata() or {}).get("digests", "{}"))
            found = {layer: Directions(*(file.get_tensor(f"{layer}.{part}") for part in PARTS)) for layer in digests}
    except (OSError, SafetensorError, ValueError) as error:
        raise LowRankError(f"{path} is damaged ({error}); compress anew") from error
    for layer, known in digests.items():
        if digest(model.get_submodule(layer)) != known:
            raise LowRankError(
                f"the factors of {layer} are not those that {DIRECTIONS} is of: they were trained since; shrink before "
                "fine-tuning or healing, or compress anew"
            )
    return found


def _without(name: str) -> str:
    """Why a model has no directions."""
    path = stored(name, RECORD)
    record: dict[str, Any] = read_json(Path(path)) if path else {}
    done = next((word for key, word in AFTERWARDS.items() if key in record), None)
    if done is not None:
        return f"was {done} after the compression"
    return f"has no {DIRECTIONS} (older versions, methods that iterate and the interpolative form write none)"


def shrink_saved(
    name: str, dtype: torch.dtype | str = "auto", **budget: Any
) -> tuple[PreTrainedModel, CompressionReport]:
    """The low-rank model in a folder, on the CPU, cut to a smaller budget by the allocation it was compressed with.

    In seconds and without data, by what `compress` found every direction to be worth; the folder stays as it is.

    Args:
        name: a folder or a Hub name.
        dtype: as of `from_pretrained`.
        budget: one of `keep`, `keep_model`, `params` and `rank_ratio`; also `allocation`, `align`, `floor` and `cap`.

    Raises:
        LowRankError: as `load_low_rank`, `load_directions` and `shrink`.
    """
    model = load_low_rank(name, dtype)
    check_model(model)
    directions = load_directions(model, name)
    record = read_json(Path(stored(name, RECORD) or Path(name) / RECORD))
    model, report = shrink(model, directions, config_for(record, budget))
    return model, CompressionReport(**{**vars(report), "statistics": record.get("statistics", {})})


def config_for(record: dict[str, Any], budget: Mapping[str, Any]) -> CompressionConfig:
    """The config that a record was made with, and another budget.

    Raises:
        LowRankError: as `CompressionConfig`; no budget was given.
    """
    given = {key: value for key, value in budget.items() if value is not None}
    if not any(kind in given for kind in BUDGETS):
        raise LowRankError("how small? Give keep, keep_model, params or rank_ratio")
    fields = CompressionConfig.__dataclass_fields__
    kept = {key: value for key, value in record["settings"].items() if key in fields and key not in BUDGETS}
    for key in ("include", "exclude"):
        kept[key] = tuple(kept[key]) if kept.get(key) else None
    return CompressionConfig(**{**kept, **given})
