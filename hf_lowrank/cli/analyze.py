"""hf-lowrank analyze: before compressing, what a model will bear, where and why."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowrank.allocation.budget import Budget
from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    BatchOption,
    DataOption,
    ExcludeOption,
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
from hf_lowrank.tasks.table import get_task


@app.command("analyze")
def analyze_command(
    context: typer.Context,
    model: ModelArgument,
    task: TaskOption,
    output: Annotated[Path, typer.Option(help="A folder for report.html, plots (PNG) and analysis.json.")],
    rank_ratio: Annotated[
        float, typer.Option(help="Share of the ranks that you think of keeping; advice is for this one.")
    ] = 0.33,
    method: MethodsOption = None,
    groups: Annotated[int, typer.Option(min=2, help="Groups of singular directions that are removed in turn.")] = 10,
    eval_samples: Annotated[
        int | None,
        typer.Option(min=2, help="Validation samples for each measurement. Default: all; 300 is often enough."),
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the measurements in the output folder and begin anew.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find out what low rank will cost a model, where and why, before compressing it.

    Sweeps the rank, removes groups of singular directions, compresses every layer alone: is that what Fisher foretold?

    Run it again on the same folder to go on after an interruption.

    Example: hf-lowrank analyze ./bert-stsb --task stsb --eval-samples 300 --output ./analysis
    """
    the_task = get_task(task, max_length, data_dir=data_dir, text_columns=text_column, label_column=label_column)
    chosen = chosen_methods(method)
    Budget("rank_ratio", rank_ratio)  # raises

    from hf_lowrank.cli.facts import origin, public_name
    from hf_lowrank.cli.work import claim
    from hf_lowrank.folder.densify import densify
    from hf_lowrank.folder.loading import load_model
    from hf_lowrank.jobs.distributed import refuse_several
    from hf_lowrank.nn.modeling_lowrank import LowRankMixin
    from hf_lowrank.statistics import compute_statistics
    from hf_lowrank.studies.analysis import AnalysisConfig, analyze, needed_statistics
    from hf_lowrank.studies.plots.report import JOURNAL, prepare_folder, save_analysis
    from hf_lowrank.tasks import load_validation
    from hf_lowrank.tasks.calibration import calibration_loader

    config = AnalysisConfig(
        chosen,
        rank_ratio,
        groups,
        eval_samples=eval_samples,
        seed=seed,
        include=patterns(include),
        exclude=patterns(exclude),
    )
    refuse_several("an analysis")
    claim(context, output, model, data_dir)
    prepare_folder(output, overwrite)
    loaded, tokenizer = load_model(model, the_task)
    if isinstance(loaded, LowRankMixin):  # whole weights are changed, and sizes are those of the dense model
        loaded = densify(loaded)
    validation = load_validation(the_task, data_dir, tokenizer, loaded.config)
    loader = calibration_loader(loaded, tokenizer, the_task, data_dir, samples, batch_size, seed)
    source = origin(model, the_task, data_dir, seed)
    kinds = needed_statistics(chosen)
    statistics = compute_statistics(loaded, loader, kinds, include=include, exclude=exclude, origin=source)
    analysis = analyze(
        loaded, tokenizer, the_task, validation, statistics, config, public_name(model), output / JOURNAL
    )
    save_analysis(analysis, output)
    if as_json:
        return print_json(analysis.to_dict())
    for finding in analysis.findings:
        console.print(f"• {finding}", highlight=False, markup=False)
    console.print(f"the report is {output / 'report.html'}; to compress as it advises:", highlight=False)
    chosen_layers = {"include": include, "exclude": exclude}
    columns = {"data_dir": data_dir, "text_column": text_column, "label_column": label_column, "max_length": max_length}
    measured = {"samples": samples if samples != 512 else None, "seed": seed or None}
    options = {"task": task, "method": analysis.recommended.method, "rank_ratio": analysis.recommended.rank_ratio}
    options |= {**columns, **measured, **chosen_layers, "output": f"{Path(public_name(model)).name}-lowrank"}
    console.print(_command("compress", model, **options), highlight=False, markup=False, soft_wrap=True)


def _command(name: str, model: str, **options: Any) -> str:
    """A command as it is typed into a shell; options that are None are left out, lists repeat theirs.

    >>> _command("compress", "my model", exclude=["*.query"], seed=None, rank_ratio=0.5)
    "hf-lowrank compress 'my model' --exclude '*.query' --rank-ratio 0.5"
    """
    words = ["hf-lowrank", name, model]
    for option, value in options.items():
        for given in value if isinstance(value, list) else [] if value is None else [value]:
            words += [f"--{option.replace('_', '-')}", str(given)]
    return shlex.join(words)
