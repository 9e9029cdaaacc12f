"""Options that say how small a model should become."""

import math
from typing import Annotated, Any

import typer

from hf_lowrank.allocation.budget import BUDGETS
from hf_lowrank.allocation.rules import ALLOCATIONS
from hf_lowrank.errors import LowRankError

PANEL, BOUNDS = "How small", "How ranks are spread"


def _budget(kind: str, default: str = "") -> Any:
    meaning = BUDGETS[kind][0].upper() + BUDGETS[kind][1:]  # str.capitalize would make 66.5m of 66.5M
    return typer.Option(f"--{kind.replace('_', '-')}", help=f"{meaning}.{default}", rich_help_panel=PANEL)


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


def refuse_contradictions(budgets: dict[str, Any], keep_score: float | None, max_loss_increase: float | None) -> None:
    """Raise where a search comes with a budget or another search, or cannot succeed.

    Raises:
        LowRankError: the message names them.
    """
    asked = budgets | {"keep_score": keep_score, "max_loss_increase": max_loss_increase}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise LowRankError(f"give one budget, not {len(given)}: {', '.join(given)}")
    if keep_score is not None and not 0 < keep_score <= 1:
        raise LowRankError(
            f"keep_score is a share of the dense model's score, in (0, 1], such as 0.99; it is {keep_score}"
        )
    if max_loss_increase is not None and not 0 <= max_loss_increase < math.inf:
        raise LowRankError(f"max_loss_increase must be a number from 0, such as 0.01; it is {max_loss_increase}")
