"""What a budget asks to be measured: the losses of single layers, or the smallest model that is good enough."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.allocation import Profile, get_allocation
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.profiling import PROFILE_SAMPLES, profile_losses
from hf_lowrank.compression.search import Found, search_smallest
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import agreed
from hf_lowrank.statistics import Statistics
from hf_lowrank.tasks import Task, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.evaluate import predict_rows, score_predictions


def measured_profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data_dir: Path | None,
    config: CompressionConfig,
    statistics: Statistics | None,
    seed: int,
) -> Profile | None:
    """The losses of single layers where the allocation asks for them."""
    if get_allocation(config.allocation or "").losses != "profile":
        return None
    loader = calibration_loader(model, tokenizer, task, data_dir, PROFILE_SAMPLES, seed=seed)
    return profile_losses(model, config, statistics, loader)


def smallest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data_dir: Path | None,
    config: CompressionConfig,
    statistics: Statistics | None,
    profile: Profile | None,
    keep_score: float | None,
    max_loss_increase: float | None,
) -> Found:
    """The smallest model within what was asked of its score or its loss on the validation data.

    Raises:
        LowRankError: as `search_smallest`; or the dense model's score is not above 0, so that it has no shares.
    """
    validation = load_validation(task, data_dir, tokenizer, model.config)

    def score(candidate: PreTrainedModel) -> float:
        outputs = [predict_rows(candidate, tokenizer, task, rows, progress=False) for rows in validation]
        scores = [score_predictions(each, task, candidate.config)["score"] for each in outputs]
        return sum(scores) / len(scores)

    def loss(candidate: PreTrainedModel) -> float:
        outputs = [predict_rows(candidate, tokenizer, task, rows, progress=False) for rows in validation]
        return sum(sum(each.losses) / len(each.losses) for each in outputs) / len(outputs)

    measure: Callable[[PreTrainedModel], float]
    if keep_score is not None:
        dense = agreed(score(model))
        if not dense > 0:
            raise LowRankError(f"the dense model scores {dense:.4g}, of which there is no share: use max_loss_increase")
        measure, limit = score, dense / keep_score if task.lower_is_better else dense * keep_score
        accept = (lambda value: value <= limit) if task.lower_is_better else (lambda value: value >= limit)
    else:
        measure, limit = loss, agreed(loss(model)) + (max_loss_increase or 0.0)
        accept = lambda value: value <= limit  # noqa: E731
    try:
        return search_smallest(model, config, statistics, measure, accept, profile)
    except LowRankError as error:
        raise LowRankError(f"{error}; wanted {'score' if keep_score is not None else 'loss'} {limit:.4g}") from None
