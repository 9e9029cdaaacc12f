"""model + data → the loss measured when a single layer has one of a few ranks: what the allocation "knapsack" takes."""

from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.allocation import Profile, ranks_below, saves_parameters
from hf_lowrank.compression.compress import layer_solver
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.uses import as_layer
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import from_everyone, shared_errors, summed
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import find_targets, unstacked
from hf_lowrank.model.weights import unwrapped
from hf_lowrank.nn.editing_lowrank import replaced
from hf_lowrank.statistics import Statistics
from hf_lowrank.statistics.batches import Batch, one_by_one, selected
from hf_lowrank.statistics.losses import SampleLosses, labelled, own_loss, sample_losses

# The ranks that are measured, as shares of min(in, out), and on how many samples of the training data commands do it.
PROFILE_SAMPLES = 128
PROFILE_RATIOS = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6)

AGREEMENT = 1e-2  # of a sample's loss alone and in a batch, in bfloat16 too, before batches are relied on


def profile_losses(
    model: PreTrainedModel,
    config: CompressionConfig,
    statistics: Statistics | None,
    loader: Iterable[Batch],
    ratios: Sequence[float] = PROFILE_RATIOS,
    progress: bool = True,
) -> Profile:
    """What the model's loss over `loader` rises by when one layer alone is factorized, by name and rank.

    The model is as it was afterwards. Ranks that save nothing are left out. Under several processes each measures its
    share of the samples, and all have the same result.

    Raises:
        LowRankError: as `compress` and `mean_loss`.
    """
    model = unwrapped(model)
    batches = _with_labels(model, loader)
    targets = find_targets(model, config.include, config.exclude)
    solver = layer_solver(targets, config, statistics)
    layers = {name: as_layer(target) for name, target in targets.items()}
    ranks = {name: _ranks(layer.shape, ratios, ranks_below(layer, config.spread)) for name, layer in layers.items()}
    profile: Profile = {name: {} for name in targets}
    with unstacked(model, targets), bar("profiling", sum(map(len, ranks.values())), "ranks", progress) as shown:
        losses = sample_losses_of(model, batches)
        dense = mean_loss(model, batches, losses)
        for name in targets:
            found = solver.weigh(name, max(ranks[name]))[1] if ranks[name] else None
            for rank in ranks[name]:
                with replaced(model, {name: solver.low_rank(name, rank, found)[0]}):
                    profile[name][rank] = mean_loss(model, batches, losses) - dense
                shown.update()
    return profile


def mean_loss(model: PreTrainedModel, batches: Iterable[Batch], losses: SampleLosses | None = None) -> float:
    """The mean of the samples' own losses, dropout off, over the batches of all processes, each giving its share.

    Samples without any label are left out. `losses` says how losses are found (see `sample_losses_of`); by default as
    the first batch allows.

    Raises:
        LowRankError: on all processes, where on one the batches have no labels, or there are none at all.
    """
    own = _with_labels(model, batches)
    losses = losses or sample_losses_of(model, own)
    total, samples = 0.0, 0
    with shared_errors():
        for batch in own:
            found = _evaluated(model, batch, losses)
            total, samples = total + float(found.double().sum()), samples + len(found)
    total, samples = summed(torch.tensor([total, samples], dtype=torch.float64)).tolist()
    if not samples:
        raise LowRankError("there are no samples to measure a loss on")
    return total / samples


def sample_losses_of(model: PreTrainedModel, batches: Sequence[Batch]) -> SampleLosses:
    """All losses of a batch at once, where on the first batch they are those of the samples alone; else one by one.

    Raises:
        LowRankError: on all processes, if one has a batch without labels.
    """
    agree = True
    with shared_errors():
        for batch in batches[:1]:
            alone = _evaluated(model, next(one_by_one(batch)), own_loss)
            try:
                together = _evaluated(model, batch, sample_losses)[:1]
                agree = torch.allclose(together.float(), alone.float(), rtol=AGREEMENT, atol=AGREEMENT)
            except Exception:  # what a sample alone did well: batches are not for this model
                agree = False
    return sample_losses if all(from_everyone(agree)) else _losses_one_by_one


def _with_labels(model: PreTrainedModel, batches: Iterable[Batch]) -> list[Batch]:
    kept: list[Batch] = []
    with shared_errors():
        kept += [selected(batch, known) for batch in batches if (known := labelled(model, batch))]
    return kept


def _losses_one_by_one(model: PreTrainedModel, batch: Batch) -> Tensor:
    return torch.cat([own_loss(model, sample) for sample in one_by_one(batch)])


@torch.inference_mode()
def _evaluated(model: PreTrainedModel, batch: Batch, losses: SampleLosses) -> Tensor:
    """The losses of a batch in evaluation mode; the model is left in the mode it had."""
    training = model.training
    place = PartialState().device if model.device.type == "meta" else model.device  # offloaded: hooks move it
    try:
        return losses(model.eval(), send_to_device(batch, place))
    finally:
        model.train(training)


def _ranks(shape: tuple[int, int], ratios: Sequence[float], allowed: Sequence[int]) -> list[int]:
    """The allowed ranks nearest to the ratios, those that save parameters."""
    wanted = [ratio * min(shape) for ratio in ratios if allowed]
    ranks = {min(allowed, key=lambda rank: abs(rank - each)) for each in wanted}
    return sorted(rank for rank in ranks if saves_parameters(shape, rank))
