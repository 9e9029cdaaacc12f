"""What a job will take → bytes for each process, known before it starts, and a refusal where there are fewer."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import AutoConfig, PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.blocks import block_bytes, has_stacked_experts
from hf_lowrank.model.locating import resolve
from hf_lowrank.model.targets import Target, find_targets
from hf_lowrank.model.weightless import weightless
from hf_lowrank.statistics.kinds import KINDS, sum_shape
from hf_lowrank.statistics.names import ALTERNATING, passes
from hf_lowrank.tasks import Task

GIB = 2**30
CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))  # version 2, as in containers


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process takes at its peak: the model, the statistics of all layers, and the rest in passing."""

    model: int
    statistics: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.statistics + self.workspace

    def to_dict(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return asdict(self) | {"total": self.total}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in asdict(self).items())
        return f"{_gib(self.total)} ({parts})"


def estimate_memory(
    model: PreTrainedModel,
    kinds: Sequence[str],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    tokens: int = 0,
) -> MemoryEstimate:
    """What measuring `kinds` on batches of `tokens` and factorizing will take; the model may be on the meta device.

    An estimate: activations are taken as the inputs and outputs of the targeted layers twice over, and layers beside
    each other with the same width as readers of one input. A convolution is taken to have as many positions as there
    are tokens, and one at a time is cut into patches, in float32.

    Raises:
        LowRankError: as `find_targets`.
    """
    targets = find_targets(model, include, exclude)
    return MemoryEstimate(
        _bytes(model.parameters()) + _bytes(model.buffers()),
        statistics_bytes(targets, kinds),
        _workspace(model, list(targets.values()), kinds, tokens),
    )


def estimate_by_blocks(
    model: PreTrainedModel,
    kinds: Sequence[str],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    tokens: int = 0,
) -> MemoryEstimate:
    """As `estimate_memory`, where blocks come from disk one at a time: two of them, and the statistics of one.

    Models with stacked experts are in memory, but for the statistics.

    Raises:
        LowRankError: as `find_targets`.
    """
    targets, blocks = find_targets(model, include, exclude), block_bytes(model)
    inside = [{n: target for n, target in targets.items() if n.startswith(f"{block}.")} for block in blocks]
    inside = [layers for layers in inside if layers]
    whole = _bytes(model.parameters()) + _bytes(model.buffers())
    two = whole - sum(blocks.values()) + 2 * max(blocks.values(), default=0)
    return MemoryEstimate(
        whole if has_stacked_experts(model) else two,
        max((statistics_bytes(layers, kinds) for layers in inside), default=0),
        max((_workspace(model, list(layers.values()), kinds, tokens) for layers in inside), default=0),
    )


def _workspace(model: PreTrainedModel, layers: Sequence[Target], kinds: Sequence[str], tokens: int) -> int:
    """Of running some layers at once forward and back, or of factorizing the largest, whichever is more."""
    size = next(model.parameters()).element_size()
    vocabulary = getattr(model.get_output_embeddings(), "out_features", 0)
    visited = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    width = sum(_width(layer) * _routed_share(layer, visited) for layer in layers)
    activations = round(tokens * (2 * size * width + 3 * 4 * vocabulary))
    patches = 4 * tokens * max((layer.shape[1] for layer in layers if layer.kind == "convolution"), default=0)
    gradient = 2 * 4 * max(prod(layer.shape) for layer in layers) if kinds else 0
    solving = max(factorization_bytes(layer.shape, layer.kind == "embedding") for layer in layers)
    return max(activations + gradient + patches, solving)


def statistics_bytes(targets: Mapping[str, Target], kinds: Sequence[str]) -> int:
    """Of the sums of these kinds, and of those that they need, in float32. Factors that take turns lie there twice."""
    total = 0
    for kind in {kind for part in passes(kinds) for kind in part}:
        sums = {}
        for name, target in targets.items():
            beside, _, last = name.rpartition(".")
            may_share = KINDS[kind].of_input and target.kind != "convolution" and not last.isdigit()
            key = (beside, target.shape[1]) if may_share else name  # each expert has its own tokens
            sums[key] = 4 * prod(sum_shape(kind, target))
        total += sum(sums.values()) * (2 if kind in ALTERNATING else 1)
    return total


def _routed_share(target: Target, visited: int | None) -> float:
    """The share of the tokens that a layer sees, all but of stacked experts of which each token is `visited` few."""
    experts: Any = target.owner
    return 1.0 if experts is None or not visited else min(1.0, visited / experts.num_experts)


def _width(target: Target) -> int:
    """The numbers that a layer reads and gives for one token or position."""
    out_features, in_features = target.shape
    read: Any = target.module.in_channels if target.kind == "convolution" else in_features
    return out_features + read


def factorization_bytes(shape: tuple[int, int], embedding: bool = False) -> int:
    """Of factorizing a weight [out, in] in float64: its two moments and their Cholesky factors, scaled copies of the
    weight, and an eigenproblem of its shorter side. An embedding's input moment is a diagonal."""
    sides = shape[:1] if embedding else shape
    return 8 * (3 * max(sides) ** 2 + sum(side**2 for side in sides) + 5 * prod(shape) + 4 * min(shape) ** 2)


def skeleton(name: str, task: Task, device: torch.device) -> PreTrainedModel | None:
    """The model called `name` without its weights, on the meta device; None where it cannot be made.

    What is wrong with a model is for `load_model` to say.
    """
    try:
        config = AutoConfig.from_pretrained(resolve(name))
        stored = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype or torch.float32
        return weightless(task.auto_class.from_config, config, dtype=torch.float32 if device.type == "cpu" else stored)
    except Exception:
        return None


def statistics_device(estimate: MemoryEstimate, device: torch.device) -> torch.device | None:
    """Where the statistics can be kept: beside the layers (None), else in main memory.

    Raises:
        LowRankError: the job does not fit; the message says by how much, and what helps.
    """
    free = available(device)
    if estimate.total <= free:
        return None
    spared = MemoryEstimate(estimate.model, 0, estimate.workspace)
    memory = torch.device("cpu")
    if device.type != "cpu" and spared.total <= free and estimate.statistics <= available(memory):
        return memory
    raise LowRankError(
        f"each process would take about {estimate}, and {_gib(free)} are free for it on {device}; use fewer processes "
        "on a machine, a smaller --batch-size or --max-length, a method that measures less (fwsvd, asvd), or "
        "--include some layers at a time"
    )


def available(device: torch.device) -> int:
    """Bytes that this process may still take: of its accelerator, or its share of the main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    if all(path.is_file() for path in CGROUP) and (limit := CGROUP[0].read_text().strip()).isdigit():
        free = min(free, int(limit) - int(CGROUP[1].read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"
