"""hf-lowrank sweep: score, size and time over methods and budgets, as a table and a plot."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import app
from hf_lowrank.cli.budgets import AlignOption
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    BatchOption,
    DataOption,
    ExcludeOption,
    FormOption,
    IncludeOption,
    JsonOption,
    LabelColumnOption,
    LengthOption,
    MethodsOption,
    ModelArgument,
    SamplesOption,
    SeedOption,
    TaskOption,
    TextColumnOption,
    chosen_methods,
    patterns,
)
from hf_lowrank.studies.sweep_settings import SweepConfig
from hf_lowrank.tasks.table import get_task


@app.command("sweep")
def sweep_command(
    context: typer.Context,
    model: ModelArgument,
    task: TaskOption,
    output: Annotated[Path, typer.Option(help="A folder for results; with an unfinished sweep, that goes on.")],
    method: MethodsOption = None,
    allocation: Annotated[
        list[str] | None, typer.Option(help="Spread of ranks; may be repeated. Default: each method's own.")
    ] = None,
    budget: Annotated[str, typer.Option(help="What the values are: rank-ratio, keep, keep-model, params, …")] = (
        "rank-ratio"
    ),
    value: Annotated[list[str], typer.Option(help="How small; may be repeated.")] = ["0.5", "0.33", "0.2", "0.1"],  # noqa: B006
    epochs: Annotated[float, typer.Option(help="Fine-tune each model so long, and score it again.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Fine-tune in bfloat16, which is faster.")] = False,
    align: AlignOption = None,
    form: FormOption = "factors",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    data_dir: DataOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    samples: SamplesOption = 512,
    batch_size: BatchOption = 16,
    max_length: LengthOption = None,
    seed: SeedOption = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the results in the output folder and begin anew.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model compressed by every method at every budget: results.jsonl, a table and plots.

    Example: hf-lowrank sweep ./bert-stsb --task stsb --method svd --method kfac --output ./bert-stsb-sweep
    """
    the_task = get_task(task, max_length, data_dir=data_dir, text_columns=text_column, label_column=label_column)
    values = tuple(float(each) if _is_number(each) else each for each in value)
    allocations = tuple(allocation) if allocation else None
    methods = chosen_methods(method)
    config = SweepConfig(
        methods,
        allocations,
        budget.replace("-", "_"),
        values,
        epochs,
        bf16,
        samples,
        seed,
        include=patterns(include),
        exclude=patterns(exclude),
        align=align,
        form=form,
        batch_size=batch_size,
    )

    from hf_lowrank.cli.facts import origin
    from hf_lowrank.cli.work import claim
    from hf_lowrank.folder.loading import load_model
    from hf_lowrank.jobs.distributed import refuse_several
    from hf_lowrank.studies.sweep import forget, sweep
    from hf_lowrank.studies.sweep_summary import write_summary

    refuse_several("a sweep")
    claim(context, output, model, data_dir)
    if overwrite:
        forget(output)
    loaded, tokenizer = load_model(model, the_task)
    source = origin(model, the_task, data_dir, seed)
    records = sweep(loaded, tokenizer, the_task, data_dir, config, output, source)
    table = write_summary(records, the_task, output)
    if as_json:
        return print_json({"records": records})
    console.print(table, highlight=False)
    console.print(f"results, summary.md and plots are in {output}", highlight=False)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
