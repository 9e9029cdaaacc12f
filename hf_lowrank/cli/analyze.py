"""hf-lowrank analyze: before compressing, what a model will bear, where and why."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.allocation.budget import Budget
from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    CalibrationOptions,
    DataOptions,
    JsonOption,
    LayerOptions,
    MethodsOption,
    ModelArgument,
    TaskOption,
    chosen_methods,
)
from hf_lowrank.solvers.family import get_method

if TYPE_CHECKING:
    from hf_lowrank.studies.analysis import Analysis
    from hf_lowrank.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """The options of `hf-lowrank analyze`, in the order of its help."""

    task: TaskOption
    output: Annotated[Path, typer.Option(help="A folder for report.html, plots (PNG) and analysis.json.")]
    rank_ratio: Annotated[
        float, typer.Option(help="Share of the ranks that you think of keeping; advice is for this one.")
    ] = 0.33
    method: MethodsOption = None
    groups: Annotated[int, typer.Option(min=2, help="Groups of singular directions that are removed in turn.")] = 10
    eval_samples: Annotated[
        int | None,
        typer.Option(min=2, help="Validation samples for each measurement. Default: all; 300 is often enough."),
    ] = None
    data: DataOptions
    calibration: CalibrationOptions
    layers: LayerOptions
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the measurements in the output folder and begin anew.")
    ] = False
    as_json: JsonOption = False


@command("analyze")
def analyze_command(context: typer.Context, model: ModelArgument, given: AnalyzeOptions) -> None:
    """Find out what low rank will cost a model, where and why, before compressing it.

    Sweeps the rank, removes groups of singular directions, compresses every layer alone: is that what Fisher foretold?

    Run it again on the same folder to go on after an interruption.

    Example: hf-lowrank analyze ./bert-stsb --task stsb --eval-samples 300 --output ./analysis
    """
    task = given.data.of_task(given.task)
    methods = chosen_methods(given.method)
    Budget("rank_ratio", given.rank_ratio)  # raises

    from hf_lowrank.cli.work import claim
    from hf_lowrank.folder.facts import public_name
    from hf_lowrank.jobs.distributed import refuse_several
    from hf_lowrank.studies.plots.report import prepare_folder, save_analysis

    refuse_several("an analysis")
    claim(context, given.output, model, given.data.data_dir)
    prepare_folder(given.output, given.overwrite)
    analysis = _analyzed(model, task, methods, given)
    save_analysis(analysis, given.output)
    if given.as_json:
        return print_json(analysis.to_dict())
    for finding in analysis.findings:
        console.print(f"• {finding}", highlight=False, markup=False)
    console.print(f"the report is {given.output / 'report.html'}; to compress as it advises:", highlight=False)
    advised = {"method": analysis.recommended.method, "rank_ratio": analysis.recommended.rank_ratio}
    options = {"task": given.task, **advised, **_changed(given.data), **_changed(given.calibration)}
    if get_method(analysis.recommended.method).labels != "data":  # what was measured here is the loss of the data
        options |= {"labels": "data"}
    options |= {**_changed(given.layers), "output": f"{Path(public_name(model)).name}-lowrank"}
    console.print(_command("compress", model, **options), highlight=False, markup=False, soft_wrap=True)


def _analyzed(model: str, task: "Task", methods: tuple[str, ...], given: AnalyzeOptions) -> "Analysis":
    from hf_lowrank.folder.densify import densify
    from hf_lowrank.nn.modeling_lowrank import LowRankMixin
    from hf_lowrank.pipeline import Pipeline
    from hf_lowrank.studies.analysis import AnalysisConfig, analyze, needed_statistics
    from hf_lowrank.studies.plots.report import JOURNAL

    chosen: dict[str, Any] = {name: getattr(given, name) for name in ("rank_ratio", "groups", "eval_samples")}
    config = AnalysisConfig(methods, **chosen, seed=given.calibration.seed, **given.layers.patterns)
    pipeline = Pipeline.load(model, task, given.data.data_dir, **vars(given.calibration))
    pipeline.check_losses("an analysis")
    if isinstance(pipeline.model, LowRankMixin):  # whole weights are changed, and sizes are those of the dense model
        pipeline.model = densify(pipeline.model)
    validation = pipeline.validation
    statistics = pipeline.measure(needed_statistics(methods), **given.layers.patterns)
    rest: Any = (pipeline.tokenizer, task, validation, statistics, config, pipeline.name, given.output / JOURNAL)
    return analyze(pipeline.model, *rest)


def _changed(group: Any) -> dict[str, Any]:
    """The options of a group that are not as by default."""
    return {f.name: getattr(group, f.name) for f in fields(group) if getattr(group, f.name) != f.default}


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
