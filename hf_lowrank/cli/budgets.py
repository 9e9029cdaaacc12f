"""Options that say how small a model should become, and the search for the smallest that is good enough."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.allocation import ALLOCATIONS, BUDGETS, Profile, get_allocation
from hf_lowrank.compression.compress import CompressionConfig
from hf_lowrank.compression.profiling import PROFILE_SAMPLES, profile_losses
from hf_lowrank.compression.search import Found, search_smallest
from hf_lowrank.errors import LowRankError
from hf_lowrank.statistics import Statistics
from hf_lowrank.tasks import Task, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.evaluate import predict_rows, score_predictions

PANEL, BOUNDS = "How small", "How ranks are spread"


def _budget(kind: str, default: str = "") -> Any:
    return typer.Option(
        f"--{kind.replace('_', '-')}", help=f"{BUDGETS[kind].capitalize()}.{default}", rich_help_panel=PANEL
    )


RankRatioOption = Annotated[float | None, _budget("rank_ratio", " [dim]This one, 0.33, if none is given.[/dim]")]
KeepOption = Annotated[float | None, _budget("keep")]
KeepModelOption = Annotated[float | None, _budget("keep_model")]
ParamsOption = Annotated[str | None, _budget("params")]
FlopsOption = Annotated[str | None, _budget("flops")]
LatencyOption = Annotated[float | None, _budget("latency")]
KeepScoreOption = Annotated[
    float | None,
    typer.Option(
        help="Search: the smallest model whose validation score keeps this share, such as 0.99.",
        rich_help_panel=PANEL,
    ),
]
LossOption = Annotated[
    float | None,
    typer.Option(
        "--max-loss-increase",
        help="Search: the smallest model whose mean validation loss rises by no more than this.",
        rich_help_panel=PANEL,
    ),
]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        help="Which layers get the budget: "
        + "; ".join(f"{rule.name}, {rule.description}" for rule in ALLOCATIONS.values())
        + ". [dim]Default: by method.[/dim]",
        rich_help_panel=BOUNDS,
    ),
]
AlignOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Make ranks multiples of this: 8 suits CPUs, 16 to 64 GPUs; 1 allows any. [dim]Default: multiples of 8, "
        "or less than 8, in layers of at least 64 inputs and outputs; any rank with --allocation uniform.[/dim]",
        rich_help_panel=BOUNDS,
    ),
]
FloorOption = Annotated[
    float, typer.Option(help="Least rank of a layer, as a share of its uniform rank, 0 to 1.", rich_help_panel=BOUNDS)
]
CapOption = Annotated[
    float | None,
    typer.Option(help="Largest rank of a layer, as a multiple of its uniform rank.", rich_help_panel=BOUNDS),
]


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
    """The smallest model within what was asked of its score or its loss on the validation data."""
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
        measure, limit = score, score(model) * (1 / keep_score if task.lower_is_better else keep_score)
        accept = (lambda value: value <= limit) if task.lower_is_better else (lambda value: value >= limit)
    else:
        measure, limit = loss, loss(model) + (max_loss_increase or 0.0)
        accept = lambda value: value <= limit  # noqa: E731
    try:
        return search_smallest(model, config, statistics, measure, accept, profile)
    except LowRankError as error:
        raise LowRankError(f"{error}; wanted {'score' if keep_score is not None else 'loss'} {limit:.4g}") from None


def refuse_contradictions(budgets: dict[str, Any], keep_score: float | None, max_loss_increase: float | None) -> None:
    """Raise where a search comes with a budget or another search.

    Raises:
        LowRankError: the message names them.
    """
    asked = budgets | {"keep_score": keep_score, "max_loss_increase": max_loss_increase}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise LowRankError(f"give one budget, not {len(given)}: {', '.join(given)}")
    if keep_score is not None and keep_score <= 0:
        raise LowRankError(f"keep_score must be above 0, such as 0.99; it is {keep_score}")
