"""hf-lowrank statistics: measure once, compress many times."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console
from hf_lowrank.cli.options import (
    DataOrTexts,
    JobOptions,
    LayerOptions,
    ModelArgument,
    StatisticsCalibration,
    refuse_taken,
)
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers.family import METHODS
from hf_lowrank.statistics.names import KIND_NEEDS, check_kinds
from hf_lowrank.tasks.table import NAMES

if TYPE_CHECKING:
    from hf_lowrank.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """The options of `hf-lowrank statistics`, in the order of its help."""

    output: Annotated[Path, typer.Option(help="Where the statistics go.")]
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"What to measure; may be repeated: {', '.join(KIND_NEEDS)}. Default: what kfac needs."),
    ] = None
    task: Annotated[str | None, typer.Option(help=f"The task, not needed with --texts: {', '.join(NAMES)}.")] = None
    data: DataOrTexts
    calibration: StatisticsCalibration
    layers: LayerOptions
    job: JobOptions

    @property
    def kinds(self) -> list[str]:
        """What to measure."""
        return list(self.kind or METHODS["kfac"].needs)


@command("statistics")
def statistics_command(context: typer.Context, model: ModelArgument, given: StatisticsOptions) -> None:
    """Measure statistics once, to compress with them many times (compress --statistics)."""
    check_kinds(given.kinds)
    task = given.data.reading(given.task)
    if task is None and given.data.texts is None:
        raise LowRankError("statistics needs a --task or --texts to measure on")
    refuse_taken(given.output, given.job.overwrite or given.job.resume)

    from accelerate import PartialState

    from hf_lowrank.cli.work import claim, refuse_output

    claim(context, given.output, model, given.data.data_dir, given.data.texts)
    task = task or given.data.of_texts(model)
    replace = refuse_output(given.output, given.job.resume, given.job.overwrite)
    pipeline, measured = _measured(model, task, given)
    if PartialState().is_main_process:
        pipeline.save_statistics(measured, given.output, replace)
        pipeline.finish()
        console.print(
            f"{', '.join(measured.kinds)} of {len(measured.weights)} layers over {measured.samples} samples "
            f"saved to {given.output}"
        )


def _measured(model: str, task: "Task | None", given: StatisticsOptions) -> Any:
    """The pipeline of the model called `model`, and the statistics that were measured with it."""
    from hf_lowrank.cli.work import check_memory, work_folder
    from hf_lowrank.pipeline import Pipeline

    _, place = check_memory(model, task, given.kinds, given.layers, given.calibration.batch_size)
    pipeline = Pipeline.load(model, task, given.data.data_dir, device=place, **vars(given.calibration))
    pipeline.labels = pipeline.labels_for(CompressionConfig("kfac"))
    settings = {"kinds": given.kinds, **vars(given.layers)}
    pipeline.begin(work_folder(given.output), settings, **vars(given.job))
    return pipeline, pipeline.measure(given.kinds, **given.layers.patterns)
