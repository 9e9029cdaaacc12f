"""What is in a saved low-rank model, from its config and file headers alone: no weights are read."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.table import Table

from hf_lowrank.folder.reading import low_rank_class, read_low_rank_config
from hf_lowrank.folder.saving import read_record
from hf_lowrank.nn.modeling_lowrank import LowRankMixin


def inspect(folder: str) -> dict[str, Any]:
    """Facts of a low-rank model as plain JSON values: architecture, parameters, bytes on disk, rank of every layer.

    Raises:
        LowRankError: no model, or one that is not low-rank.
    """
    config = read_low_rank_config(folder)
    model = _skeleton(config)
    layers = {
        name: {
            "out": module.out_features,
            "in": module.in_features,
            "rank": module.rank,
            "parameters": module.num_parameters(),
        }
        for name, module in model.factorized_layers().items()
    }
    saved = sum(layer["out"] * layer["in"] - layer["parameters"] for layer in layers.values())
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


def _skeleton(config: Any) -> LowRankMixin:
    """The model without its weights."""
    with init_empty_weights(), torch.device("meta"):
        return low_rank_class(config)(copy.deepcopy(config))


def ranks_table(layers: dict[str, dict[str, int]]) -> Table:
    """Layers of the same type, shape and rank in one row."""
    kinds = Counter(
        (
            ".".join("*" if part.isdigit() else part for part in name.split(".")),
            layer["out"],
            layer["in"],
            layer["rank"],
            layer["parameters"],
        )
        for name, layer in layers.items()
    )
    table = Table("layers", "count", "out × in", "rank", "parameters each", box=None)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for (name, out_features, in_features, rank, parameters), count in kinds.items():
        size = f"{out_features * in_features:,} → {parameters:,}"
        table.add_row(name, str(count), f"{out_features} × {in_features}", str(rank), size)
    return table
