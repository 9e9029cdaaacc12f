"""What is in a saved low-rank model, from its config and file headers alone: no weights are read."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel

import hf_lowrank.modeling_lowrank as modeling
from hf_lowrank.errors import LowRankError
from hf_lowrank.loading import refuse_missing
from hf_lowrank.modeling_lowrank import LowRankLinear
from hf_lowrank.saving import read_record


def inspect(folder: str) -> dict[str, Any]:
    """Facts of a low-rank model as plain JSON values: architecture, parameters, bytes on disk, rank of every layer.

    Raises:
        LowRankError: no model, or one that is not low-rank.
    """
    refuse_missing(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise LowRankError(f"{folder} cannot be read as a model: {error}") from error
    if not getattr(config, "ranks", None):
        raise LowRankError(f"{folder} is an ordinary {config.model_type} model: none of its layers is factorized")
    model = _skeleton(config)
    layers = {
        name: {"out": m.out_features, "in": m.in_features, "rank": m.rank}
        for name, m in model.named_modules()
        if isinstance(m, LowRankLinear)
    }
    saved = sum(m["out"] * m["in"] - m["rank"] * (m["out"] + m["in"]) for m in layers.values())
    parameters = model.num_parameters()
    return {
        "architecture": (config.architectures or [type(model).__name__])[0],
        "base_model_type": config.base_model_type,
        "dtype": str(config.dtype).removeprefix("torch."),
        "parameters": parameters,
        "parameters_dense": parameters + saved,
        "bytes": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
        "layers": layers,
        "record": read_record(folder),
    }


def _skeleton(config: Any) -> PreTrainedModel:
    """The model without its weights."""
    architecture = (config.architectures or [""])[0]
    if not hasattr(modeling, architecture):
        raise LowRankError(
            f"config.json names the architecture {architecture!r}, which this version of transformers does not have"
        )
    with init_empty_weights(), torch.device("meta"):
        return getattr(modeling, architecture)(copy.deepcopy(config))


def ranks_table(layers: dict[str, dict[str, int]]) -> Table:
    """Layers of the same type, shape and rank in one row."""
    kinds = Counter(
        (
            ".".join("*" if part.isdigit() else part for part in name.split(".")),
            layer["out"],
            layer["in"],
            layer["rank"],
        )
        for name, layer in layers.items()
    )
    table = Table("layers", "count", "out × in", "rank", "parameters each", box=None)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for (name, out_features, in_features, rank), count in kinds.items():
        size = f"{out_features * in_features:,} → {rank * (out_features + in_features):,}"
        table.add_row(name, str(count), f"{out_features} × {in_features}", str(rank), size)
    return table
