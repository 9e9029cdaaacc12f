"""hf-lowrank statistics: measure once, compress many times."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console
from hf_lowrank.cli.options import (
    BatchOption,
    DataOption,
    ExcludeOption,
    IncludeOption,
    LabelColumnOption,
    LengthOption,
    MinutesOption,
    ModelArgument,
    OverwriteOption,
    ResumeOption,
    SamplesOption,
    SeedOption,
    TaskOption,
    TextColumnOption,
    refuse_taken,
)
from hf_lowrank.jobs.interrupts import MINUTES
from hf_lowrank.solvers.family import METHODS
from hf_lowrank.statistics.names import KIND_NEEDS, check_kinds
from hf_lowrank.tasks.table import get_task


@app.command("statistics")
def statistics_command(
    context: typer.Context,
    model: ModelArgument,
    task: TaskOption,
    output: Annotated[Path, typer.Option(help="Where the statistics go.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"What to measure; may be repeated: {', '.join(KIND_NEEDS)}. Default: what kfac needs."),
    ] = None,
    data_dir: DataOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    samples: SamplesOption = 512,
    batch_size: BatchOption = 16,
    max_length: LengthOption = None,
    seed: SeedOption = 0,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    checkpoint_minutes: MinutesOption = MINUTES,
) -> None:
    """Measure statistics once, to compress with them many times (compress --statistics)."""
    kinds = kind or METHODS["kfac"].needs
    check_kinds(kinds)
    the_task = get_task(task, max_length, data_dir=data_dir, text_columns=text_column, label_column=label_column)
    refuse_taken(output, overwrite or resume)

    from accelerate import PartialState

    from hf_lowrank.cli.facts import origin
    from hf_lowrank.cli.work import check_memory, claim, open_work, refuse_output
    from hf_lowrank.folder.loading import load_model
    from hf_lowrank.statistics import compute_statistics
    from hf_lowrank.tasks.calibration import calibration_loader

    claim(context, output, model, data_dir)
    replace = refuse_output(output, resume, overwrite)
    _, sums_at = check_memory(model, the_task, kinds, include, exclude, batch_size)
    loaded, tokenizer = load_model(model, the_task)
    loader = calibration_loader(loaded, tokenizer, the_task, data_dir, samples, batch_size, seed)
    source = origin(model, the_task, data_dir, seed)
    settings = {
        "kinds": list(kinds),
        "include": include,
        "exclude": exclude,
        "task": the_task.name,
        "batch_size": batch_size,
    }
    work = open_work(output, loaded, loader, settings, seed, resume, overwrite, checkpoint_minutes)
    measured = compute_statistics(
        loaded, loader, kinds, include=include, exclude=exclude, origin=source, device=sums_at, work=work
    )
    if PartialState().is_main_process:
        work.mark_saving()
        measured.save(output, replace)
        work.remove()
        console.print(
            f"{', '.join(measured.kinds)} of {len(measured.weights)} layers over {measured.samples} samples "
            f"saved to {output}"
        )
