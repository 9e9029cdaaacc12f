"""hf-lowrank sweep: score, size and time over methods and budgets, as a table and a plot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.budgets import AlignOption
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    DataOptions,
    FormOption,
    JsonOption,
    LayerOptions,
    MethodsOption,
    ModelArgument,
    SequentialOption,
    StatisticsCalibration,
    TaskOption,
    chosen_methods,
)
from hf_lowrank.studies.sweep_settings import SweepConfig


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of `hf-lowrank sweep`, in the order of its help."""

    task: TaskOption
    output: Annotated[Path, typer.Option(help="A folder for results; with an unfinished sweep, that goes on.")]
    method: MethodsOption = None
    allocation: Annotated[
        list[str] | None, typer.Option(help="Spread of ranks; may be repeated. Default: each method's own.")
    ] = None
    budget: Annotated[str, typer.Option(help="What the values are: rank-ratio, keep, keep-model, params, …")] = (
        "rank-ratio"
    )
    value: Annotated[list[str], typer.Option(help="How small; may be repeated.")] = field(
        default_factory=lambda: ["0.5", "0.33", "0.2", "0.1"]
    )
    epochs: Annotated[float, typer.Option(help="Fine-tune each model so long, and score it again.")] = 0
    bf16: Annotated[bool, typer.Option("--bf16", help="Fine-tune in bfloat16, which is faster.")] = False
    align: AlignOption = None
    form: FormOption = "factors"
    sequential: SequentialOption = None
    layers: LayerOptions
    data: DataOptions
    calibration: StatisticsCalibration
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the results in the output folder and begin anew.")
    ] = False
    as_json: JsonOption = False

    def config(self) -> SweepConfig:
        """What to sweep over.

        Raises:
            LowRankError: as `SweepConfig`.
        """
        over: dict[str, Any] = {"methods": chosen_methods(self.method), "budget": self.budget.replace("-", "_")}
        over["values"] = tuple(float(value) if _is_number(value) else value for value in self.value)
        over["allocations"] = tuple(self.allocation) if self.allocation else None
        rest = {name: getattr(self, name) for name in ("epochs", "bf16", "align", "form", "sequential")}
        return SweepConfig(**over, **rest, **self.layers.patterns)


@command("sweep")
def sweep_command(context: typer.Context, model: ModelArgument, given: SweepOptions) -> None:
    """Score a model compressed by every method at every budget: results.jsonl, a table and plots.

    Example: hf-lowrank sweep ./bert-stsb --task stsb --method svd --method kfac --output ./bert-stsb-sweep
    """
    task, config = given.data.of_task(given.task), given.config()

    from hf_lowrank.cli.work import claim
    from hf_lowrank.jobs.distributed import refuse_several
    from hf_lowrank.pipeline import Pipeline
    from hf_lowrank.studies.sweep import forget, sweep
    from hf_lowrank.studies.sweep_summary import write_summary

    refuse_several("a sweep")
    claim(context, given.output, model, given.data.data_dir)
    if given.overwrite:
        forget(given.output)
    pipeline = Pipeline.load(model, task, given.data.data_dir, **vars(given.calibration))
    records = sweep(pipeline, config, given.output)
    table = write_summary(records, task, given.output)
    if given.as_json:
        return print_json({"records": records})
    console.print(table, highlight=False)
    console.print(f"results, summary.md and plots are in {given.output}", highlight=False)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
