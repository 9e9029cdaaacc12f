"""Options that say how small a model should become, and how that is spread over its layers."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from hf_lowrank.allocation.budget import BUDGETS
from hf_lowrank.allocation.rules import ALLOCATIONS
from hf_lowrank.errors import LowRankError

PANEL, BOUNDS = "How small", "How ranks are spread"


def _budget(kind: str, default: str = "") -> Any:
    meaning = BUDGETS[kind][0].upper() + BUDGETS[kind][1:]  # str.capitalize would make 66.5m of 66.5M
    return typer.Option(f"--{kind.replace('_', '-')}", help=f"{meaning}.{default}", rich_help_panel=PANEL)


@dataclass(frozen=True)
class BudgetOptions:
    """How small, in one of the units of `CompressionConfig`."""

    rank_ratio: Annotated[float | None, _budget("rank_ratio", " [dim]This one, 0.33, if none is given.[/dim]")] = None
    keep: Annotated[float | None, _budget("keep")] = None
    keep_model: Annotated[float | None, _budget("keep_model")] = None
    params: Annotated[str | None, _budget("params")] = None
    bytes: Annotated[str | None, _budget("bytes")] = None
    flops: Annotated[str | None, _budget("flops")] = None
    latency: Annotated[float | None, _budget("latency")] = None


@dataclass(frozen=True)
class SearchOptions:
    """How good, in place of how small: the arguments of `Pipeline.search`."""

    keep_score: Annotated[
        float | None,
        typer.Option(
            help="Search: the smallest model whose validation score keeps this share, such as 0.99.",
            rich_help_panel=PANEL,
        ),
    ] = None
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            help="Search: the smallest model whose mean validation loss rises by no more than this.",
            rich_help_panel=PANEL,
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether the smallest model is searched that is good enough."""
        return self.keep_score is not None or self.max_loss_increase is not None

    def refuse_contradictions(self, budgets: BudgetOptions) -> None:
        """Raise where a search comes with a budget or another search, or cannot succeed.

        Raises:
            LowRankError: the message names them.
        """
        asked = [(f.name, getattr(group, f.name)) for group in (budgets, self) for f in fields(group)]
        given = [name for name, value in asked if value is not None]
        if len(given) > 1:
            raise LowRankError(f"give one budget, not {len(given)}: {', '.join(given)}")
        if self.keep_score is not None and not 0 < self.keep_score <= 1:
            raise LowRankError(
                f"keep_score is a share of the dense model's score, in (0, 1], such as 0.99; it is {self.keep_score}"
            )
        if self.max_loss_increase is not None and not 0 <= self.max_loss_increase < math.inf:
            raise LowRankError(
                f"max_loss_increase must be a number from 0, such as 0.01; it is {self.max_loss_increase}"
            )


AlignOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Make ranks multiples of this: 8 suits CPUs, 16 to 64 GPUs; 1 allows any. [dim]Default: multiples of 8, "
        "or less than 8, in layers of at least 64 inputs and outputs; any rank with --allocation uniform.[/dim]",
        rich_help_panel=BOUNDS,
    ),
]


@dataclass(frozen=True)
class SpreadOptions:
    """Which layers get how much of it: the fields of `CompressionConfig` of these names."""

    allocation: Annotated[
        str | None,
        typer.Option(
            help="Which layers get the budget: "
            + "; ".join(f"{rule.name}, {rule.description}" for rule in ALLOCATIONS.values())
            + ". [dim]Default: by method.[/dim]",
            rich_help_panel=BOUNDS,
        ),
    ] = None
    align: AlignOption = None
    floor: Annotated[
        float,
        typer.Option(help="Least rank of a layer, as a share of its uniform rank, 0 to 1.", rich_help_panel=BOUNDS),
    ] = 0.0
    cap: Annotated[
        float | None,
        typer.Option(help="Largest rank of a layer, as a multiple of its uniform rank.", rich_help_panel=BOUNDS),
    ] = None
