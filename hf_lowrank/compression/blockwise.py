"""A model without weights, a config and free memory → whether it is compressed block by block, and what that takes."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.memory import (
    MemoryEstimate,
    available,
    estimate_by_blocks,
    estimate_memory,
    statistics_device,
)
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.settings import check_choice
from hf_lowrank.model.blocks import outer_blocks
from hf_lowrank.model.targets import factorized_layers, find_targets

PLANS = ("auto", "on", "off")
NOTHING_MEASURED = "nothing is measured"


@dataclass(frozen=True)
class Plan:
    """How a job goes about its memory: block by block or not, where the statistics are, and why not if it was asked."""

    estimate: MemoryEstimate
    by_blocks: bool
    place: torch.device | None = None
    why_whole: str = ""


def plan_memory(
    model: PreTrainedModel,
    config: CompressionConfig,
    asked: str,
    device: torch.device,
    tokens: int,
    also: str = "",
) -> Plan:
    """Whether to go block by block, as `asked`: "on", "off", or "auto", where the whole model does not fit.

    Args:
        model: on the meta device.
        config: how it is to be compressed.
        asked: one of `PLANS`.
        device: where it is run.
        tokens: of a batch.
        also: what else of the job needs the whole model, if anything does.

    Raises:
        LowRankError: it fits neither way; there is no such plan; or as `find_targets`.
    """
    check_choice("blockwise", asked, PLANS)
    patterns = {"include": config.include, "exclude": config.exclude}
    whole = estimate_memory(model, config.needs, **patterns, tokens=tokens)
    why = also or ("" if config.needs else NOTHING_MEASURED) or why_whole(model, config)
    fits = whole.total <= available(device)
    if asked == "off" or (asked == "auto" and (fits or not config.needs)):
        return Plan(whole, False, statistics_device(whole, device))
    if why:
        try:
            return Plan(whole, False, statistics_device(whole, device), why)
        except LowRankError as error:
            raise LowRankError(f"{error}; it cannot go block by block, as {why}") from None
    by_blocks = estimate_by_blocks(model, config.needs, **patterns, tokens=tokens)
    return Plan(by_blocks, True, statistics_device(by_blocks, device))


def why_whole(model: PreTrainedModel, config: CompressionConfig) -> str:
    """Why a model must be in memory whole to be compressed so; "" if its blocks may come one at a time."""
    if factorized_layers(model):
        return "it was compressed before"
    if config.allocation == "knapsack":
        return "the allocation knapsack measures all of it"
    if config.form != "factors" or config.budget.kind in ("bytes", "latency"):
        return f"{config.form if config.form != 'factors' else config.budget.kind} needs it"
    blocks = outer_blocks(model)
    for name in find_targets(model, config.include, config.exclude):
        if not any(name.startswith(f"{block}.") for block in blocks):
            return f"{name} is in none of its blocks"
    return ""
