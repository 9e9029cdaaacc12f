"""A model, its statistics and a budget in bytes → the rank and the bits of every layer that together lose least."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.allocation import get_allocation
from hf_lowrank.allocation.budget import ImpossibleBudget
from hf_lowrank.allocation.choices import cheapest, dearest
from hf_lowrank.allocation.stored import BITS, Packed, Stored, byte_choices
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.errors import LowRankError
from hf_lowrank.model.packable import packable
from hf_lowrank.model.targets import Target, find_targets

HEADER = 120  # bytes that a file says of a tensor
OTHERS = 8  # bits of layers that are not targeted


def with_embeddings(model: PreTrainedModel, config: CompressionConfig) -> CompressionConfig:
    """The config with patterns for the layers of the blocks and the input embedding, where bytes count and it has none.

    An embedding that shares its weights with a head is left out.
    """
    if config.budget.kind != "bytes" or config.include is not None:
        return config
    blocks = dict.fromkeys(re.sub(r"\.\d+\..*", ".*", name) for name in find_targets(model))
    layers = packable(model)
    embedding = [name for name, layer in layers.items() if layer is model.get_input_embeddings()]
    return replace(config, include=(*blocks, *embedding))


def choose_stored(
    model: PreTrainedModel,
    solver: LayerSolver,
    config: CompressionConfig,
    weighed: Mapping[str, Target],
    dtype: torch.dtype | None = None,
) -> dict[str, Stored]:
    """How every layer of `weighed` is kept, with scales and what is not rounded in `dtype`, or the model's.

    Raises:
        LowRankError: a layer is of a kind that is not packed, or was factorized before.
        ImpossibleBudget: no ranks and bits meet the budget, or nothing would be factorized; it gives the range.
    """
    choices, meanings = {}, {}
    for name, packed in _packed(model, weighed, dtype).items():
        loss, ranks = solver.rounded_loss(name), config.spread.ranks(packed.shape)
        choices[name], meanings[name] = byte_choices(packed, ranks, loss)
    others = _other_bytes(model, weighed, (dtype or model.dtype).itemsize)
    _check_range(config.budget.value, others + cheapest(choices), others + dearest(choices))
    chosen = get_allocation("greedy").decide(choices, config.budget.value - others)
    return {name: meanings[name][index] for name, index in chosen.items()}


def check_bytes(
    model: PreTrainedModel,
    config: CompressionConfig,
    targets: Mapping[str, Target],
    dtype: torch.dtype | None = None,
) -> None:
    """Raise where no ranks and bits of the targets meet the budget, before anything is measured for it.

    Raises:
        LowRankError: as `choose_stored`.
    """
    least = most = _other_bytes(model, targets, (dtype or model.dtype).itemsize)
    for packed in _packed(model, targets, dtype).values():
        ranks = (*config.spread.ranks(packed.shape), None)
        least += min(packed.bytes(Stored(rank, bits)) for rank in ranks for bits in BITS)
        most += packed.bytes(Stored(None, max(BITS)))
    _check_range(config.budget.value, least, most)


def _packed(model: PreTrainedModel, targets: Mapping[str, Target], dtype: torch.dtype | None) -> dict[str, Packed]:
    """What the bytes of every layer depend on, by name."""
    layers, itemsize = packable(model), (dtype or model.dtype).itemsize
    found = {}
    for name, target in targets.items():
        _refuse_others(target)
        weight: Any = target.module.weight
        dense = None if name in layers else weight.numel() * itemsize
        found[name] = Packed(target.shape, target.kind == "embedding", itemsize, dense)
    return found


def _check_range(wanted: float, least: float, most: float) -> None:
    if not least <= wanted <= most:
        raise ImpossibleBudget(
            f"bytes {wanted:,.0f} cannot be met: it must be between {math.ceil(least):,} (the smallest ranks in 4 "
            f"bits) and {math.floor(most):,} (all layers dense in 8 bits)"
        )


def _refuse_others(target: Target) -> None:
    if target.kind not in ("linear", "embedding") or target.rank is not None:
        what = f"is a layer of the kind {target.kind}" if target.rank is None else "was factorized before"
        raise LowRankError(
            f"{target.name} {what}, and a budget in bytes is for dense linear layers and embeddings: exclude it, or "
            "give another budget and --bits"
        )


def _other_bytes(model: PreTrainedModel, weighed: Mapping[str, Target], itemsize: int) -> float:
    """Of all that is not the weight of a weighed layer: biases, norms, layers that are not targeted, headers."""
    rounded = {id(layer.weight): layer for layer in packable(model).values()}
    left = {id(target.module.weight) for target in weighed.values()}
    total = 2 * (3 * HEADER + 16) * len(weighed)
    for parameter in model.parameters():
        layer = rounded.get(id(parameter))
        if id(parameter) in left:
            continue
        if layer is None:
            total += parameter.numel() * itemsize + HEADER
        else:
            shape = torch.Size(layer.weight.shape)
            total += Packed((shape[0], shape[1]), False, itemsize).bytes(Stored(None, OTHERS)) + 3 * HEADER
    return total
