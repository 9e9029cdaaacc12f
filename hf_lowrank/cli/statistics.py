"""hf-lowrank statistics: measure once, compress many times."""

from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState

from hf_lowrank.calibration import calibration_loader
from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console
from hf_lowrank.cli.facts import origin
from hf_lowrank.cli.options import (
    BatchOption,
    DataOption,
    ExcludeOption,
    IncludeOption,
    LengthOption,
    ModelArgument,
    OverwriteOption,
    SamplesOption,
    SeedOption,
    TaskOption,
)
from hf_lowrank.files import refuse_existing
from hf_lowrank.loading import load_model
from hf_lowrank.solvers import METHODS
from hf_lowrank.statistics import KINDS, compute_statistics
from hf_lowrank.tasks import get_task


@app.command("statistics")
def statistics_command(
    model: ModelArgument,
    task: TaskOption,
    output: Annotated[Path, typer.Option(help="Where the statistics go.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"What to measure; may be repeated: {', '.join(KINDS)}. Default: what kfac needs."),
    ] = None,
    data_dir: DataOption = None,
    samples: SamplesOption = 512,
    batch_size: BatchOption = 16,
    max_length: LengthOption = None,
    seed: SeedOption = 0,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure statistics once, to compress with them many times (compress --statistics)."""
    the_task = get_task(task, max_length)
    refuse_existing(output, overwrite)
    loaded, tokenizer = load_model(model, the_task)
    loader = calibration_loader(loaded, tokenizer, the_task, data_dir, samples, batch_size, seed)
    source = origin(model, the_task, data_dir, seed)
    kinds = kind or METHODS["kfac"].needs
    measured = compute_statistics(loaded, loader, kinds, include=include, exclude=exclude, origin=source)
    if PartialState().is_main_process:
        measured.save(output, overwrite)
        console.print(
            f"{', '.join(measured.kinds)} of {len(measured.weights)} layers over {measured.samples} samples "
            f"saved to {output}"
        )
