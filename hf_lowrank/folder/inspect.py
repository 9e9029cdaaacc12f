"""What is in a saved low-rank model, from its config and file headers alone: no weights are read."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_lowrank.allocation.budget import BUDGETS
from hf_lowrank.compression.report import described
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import weights_bytes
from hf_lowrank.folder.quantizers import in_words
from hf_lowrank.folder.reading import low_rank_class, read_low_rank_config
from hf_lowrank.folder.saving import read_record
from hf_lowrank.folder.scores import WORDS
from hf_lowrank.model.layer_names import is_expert_layer, kind_of, place_of
from hf_lowrank.model.targets import find_targets
from hf_lowrank.model.weightless import weightless
from hf_lowrank.nn.modeling_lowrank import LowRankMixin

Layer = dict[str, Any]  # its sizes, parameters and rank, None where it is dense


def inspect(folder: str) -> dict[str, Any]:
    """Facts of a low-rank model as plain JSON values: architecture, parameters, bytes on disk, rank of every layer.

    The layers are those that are factorized and, with the rank None, those that might be: the linears inside the
    blocks, and what the record of the compression names.

    Raises:
        LowRankError: no model, or one that is not low-rank.
    """
    config = read_low_rank_config(folder)
    model, record = _skeleton(config), read_record(folder)
    factorized = _factorized(model)
    layers = {**_dense(model, record), **factorized}
    in_order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    saved = sum(layer["out"] * layer["in"] - layer["parameters"] for layer in factorized.values())
    parameters = model.num_parameters()
    return {
        "architecture": (config.architectures or [type(model).__name__])[0],
        "base_model_type": config.base_model_type,
        "dtype": str(config.dtype).removeprefix("torch."),
        "parameters": parameters,
        "parameters_dense": parameters + saved,
        "bytes": weights_bytes(Path(folder)),
        "layers": {name: layers[name] for name in sorted(layers, key=lambda name: in_order.get(name, len(in_order)))},
        "record": record,
    }


def _skeleton(config: Any) -> LowRankMixin:
    """The model without its weights."""
    return weightless(low_rank_class(config), copy.deepcopy(config))


def _factorized(model: LowRankMixin) -> dict[str, Layer]:
    return {
        name: {
            "out": module.out_features,
            "in": module.in_features,
            "rank": module.rank,
            "parameters": module.num_parameters(),
        }
        for name, module in model.factorized_layers().items()
    }


def _dense(model: LowRankMixin, record: Mapping[str, Any] | None) -> dict[str, Layer]:
    """The layers that were left dense, and some that are factorized."""
    try:
        shapes = {name: target.shape for name, target in find_targets(model).items()}
    except LowRankError:  # there is none left
        shapes = {}
    for layer in (record or {}).get("layers", ()):
        shapes.setdefault(layer["name"], (layer["out_features"], layer["in_features"]))
    return {
        name: {"out": out, "in": inputs, "rank": None, "parameters": out * inputs}
        for name, (out, inputs) in shapes.items()
    }


def summary(facts: Mapping[str, Any]) -> str:
    """What `inspect` found, in a few lines."""
    size = f", {facts['bytes'] / 1e6:.1f} MB of weights" if facts["bytes"] else ""
    share = facts["parameters"] / facts["parameters_dense"]
    ranks = [layer["rank"] for layer in facts["layers"].values()]
    dense = ranks.count(None)
    lines = [
        f"{facts['architecture']}, {facts['dtype']}{size}",
        f"{facts['parameters']:,} parameters: {share:.1%} kept of the dense model's {facts['parameters_dense']:,}",
        f"{len(ranks) - dense} layers factorized, {dense} dense",
    ]
    if record := facts["record"]:
        lines += [*map(described, record.get("earlier", ())), _origin(record), *_quantization(record), *_scores(record)]
    return "\n".join(lines)


def _origin(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    budget = ", ".join(f"{kind} {settings[kind]}" for kind in BUDGETS if settings.get(kind) is not None)
    task = f" for {record['task']}" if record.get("task") else ""
    base = record.get("base_model") or "a model"
    return f"made from {base}{task} by {settings['method']}, {budget}, ranks {settings['allocation']}"


def _quantization(record: Mapping[str, Any]) -> list[str]:
    how = in_words(record)
    if how is None:
        return []
    method = record["quantization"].get("rounding", "nearest")
    rounding = "to the nearest" if method == "nearest" else f"rounded with the moments of {method}"
    return [f"quantized to {how}, {rounding}"]


def _scores(record: Mapping[str, Any]) -> list[str]:
    kinds = {"dense": "dense", "given": "given", **WORDS}
    measured = {name: record.get(f"score_{kind}") for kind, name in kinds.items()}
    scores = [f"{name} {score:.2f}" for name, score in measured.items() if score is not None]
    return [f"score: {', '.join(scores)}"] if scores else []


def ranks_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for every layer, with its block and its rank; the experts of a block share one for each projection."""
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, layer in layers.items():
        block = place_of(name).block
        key = ("–" if block is None else str(block), name if block is None else kind_of(name))
        if not is_expert_layer(name) and key in rows:  # such as an encoder's and a decoder's block of one number
            key = (key[0], name)
        rows.setdefault(key, []).append(layer)
    table = Table("block", "layer", "out × in", "rank", "of full rank", "parameters", box=None)
    table.columns[1].overflow = "fold"
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for (number, kind), members in rows.items():
        count = f" × {len(members)}" if len(members) > 1 else ""
        table.add_row(number, kind + count, f"{members[0]['out']} × {members[0]['in']}", *_ranks(members))
    return table


def _ranks(layers: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """The rank or its range, its share of the full one, and the parameters before and after."""
    dense = sum(layer["out"] * layer["in"] for layer in layers)
    ranks = sorted(layer["rank"] for layer in layers if layer["rank"] is not None)
    if not ranks:
        return "dense", "", f"{dense:,}"
    full = sum(min(layer["out"], layer["in"]) for layer in layers)
    kept = sum(layer["rank"] or min(layer["out"], layer["in"]) for layer in layers)
    greatest = "dense" if len(ranks) < len(layers) else str(ranks[-1])
    shown = greatest if greatest == str(ranks[0]) else f"{ranks[0]}–{greatest}"
    return shown, f"{kept / full:.0%}", f"{dense:,} → {sum(layer['parameters'] for layer in layers):,}"
