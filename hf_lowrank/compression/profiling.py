"""model + data → the loss measured when a single layer has one of a few ranks: what the allocation "knapsack" takes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.allocation import Profile, saves_parameters
from hf_lowrank.compression.compress import layer_solver
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import find_targets, unstacked, weight_shape
from hf_lowrank.nn.editing_lowrank import replaced
from hf_lowrank.statistics import Statistics

# The ranks that are measured, as shares of min(in, out), and on how many samples of the training data commands do it.
PROFILE_SAMPLES = 128
PROFILE_RATIOS = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6)


def profile_losses(
    model: PreTrainedModel,
    config: CompressionConfig,
    statistics: Statistics | None,
    loader: Iterable[dict[str, Any]],
    ratios: Sequence[float] = PROFILE_RATIOS,
    progress: bool = True,
) -> Profile:
    """What the model's loss over `loader` rises by when one layer alone is factorized, by name and rank.

    The model is as it was afterwards. Ranks that save nothing are left out.

    Raises:
        LowRankError: as `compress`; or the batches have no labels.
    """
    batches = list(loader)
    targets = find_targets(model, config.include, config.exclude)
    solver = layer_solver(targets, config, statistics)
    shapes = {name: weight_shape(module) for name, module in targets.items()}
    ranks = {name: _ranks(shape, ratios, config.spread.ranks(shape)) for name, shape in shapes.items()}
    profile: Profile = {name: {} for name in targets}
    with unstacked(model, targets), bar("profiling", sum(map(len, ranks.values())), "ranks", progress) as shown:
        dense = mean_loss(model, batches)
        for name in targets:
            for rank in ranks[name]:
                with replaced(model, {name: solver.low_rank(name, rank)[0]}):
                    profile[name][rank] = mean_loss(model, batches) - dense
                shown.update()
    return profile


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> float:
    """The model's own loss, the mean over batches weighted by their samples, dropout off.

    Raises:
        LowRankError: the batches have no labels, or there are none.
    """
    training, total, samples = model.training, 0.0, 0
    model.eval()
    for batch in batches:
        loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss
        if loss is None:
            raise LowRankError(f"{type(model).__name__} returned no loss: the data lack the labels that it needs")
        total += float(loss) * len(batch["labels"])
        samples += len(batch["labels"])
    model.train(training)
    if not samples:
        raise LowRankError("there are no samples to measure a loss on")
    return total / samples


def _ranks(shape: tuple[int, int], ratios: Sequence[float], allowed: Sequence[int]) -> list[int]:
    """The allowed ranks nearest to the ratios, those that save parameters."""
    wanted = [ratio * min(shape) for ratio in ratios if allowed]
    ranks = {min(allowed, key=lambda rank: abs(rank - each)) for each in wanted}
    return sorted(rank for rank in ranks if saves_parameters(shape, rank))
