"""hf-lowrank compress: from a fine-tuned model to a folder that from_pretrained loads."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.budgets import BudgetOptions, SearchOptions, SpreadOptions
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    DataOrTexts,
    FactorOptions,
    JobOptions,
    JsonOption,
    LayerOptions,
    MethodOption,
    ModelArgument,
    StatisticsCalibration,
    VerboseOption,
    refuse_taken,
)
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.quantizers import Quantization
from hf_lowrank.tasks.table import NAMES

if TYPE_CHECKING:
    from hf_lowrank.pipeline import Pipeline
    from hf_lowrank.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """The options of `hf-lowrank compress`, in the order of its help."""

    output: Annotated[Path, typer.Option(help="Where the compressed model goes.")]
    task: Annotated[
        str | None,
        typer.Option(help=f"The task to measure on, not needed with --texts, or by --method svd: {', '.join(NAMES)}."),
    ] = None
    method: MethodOption = "kfac"
    budgets: BudgetOptions
    search: SearchOptions
    spread: SpreadOptions
    factors: FactorOptions
    bits: Annotated[
        int | None,
        typer.Option(help="Store its weights in 8 or 4 bits, by compressed-tensors; see 'hf-lowrank quantize'."),
    ] = None
    data: DataOrTexts
    calibration: StatisticsCalibration
    statistics: Annotated[Path | None, typer.Option(help="Use statistics saved by 'hf-lowrank statistics'.")] = None
    layers: LayerOptions
    score: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Score the model before and after, and compare its predictions with the dense model's, on the "
            "validation data (of --texts every tenth, which is not measured on).",
        ),
    ] = False
    heal: Annotated[
        bool,
        typer.Option(
            "--heal",
            help="Then train the factors for a few minutes to say what the dense model says; see 'hf-lowrank heal'.",
        ),
    ] = False
    blockwise: Annotated[
        str,
        typer.Option(
            help="Hold one block of the model in memory at a time, and read it from disk: on, off, or auto, where the "
            "whole model does not fit."
        ),
    ] = "auto"
    push_to_hub: Annotated[str | None, typer.Option(help="Publish it under this name; see 'hf-lowrank push'.")] = None
    job: JobOptions
    verbose: VerboseOption = False
    as_json: JsonOption = False

    def config(self) -> CompressionConfig:
        """What is to be done.

        Raises:
            LowRankError: an option is out of range, or two of them contradict each other.
        """
        self.search.refuse_contradictions(self.budgets)
        groups = vars(self.budgets) | vars(self.spread) | vars(self.factors)
        return CompressionConfig(self.method, **self.layers.patterns, **groups)

    def quantization(self) -> Quantization | None:
        """How its weights are stored, where that is not as they are.

        Raises:
            LowRankError: unknown bits, or the library is not installed.
        """
        if self.bits is None and self.budgets.bytes is None:
            return None
        if self.bits is not None and self.budgets.bytes is not None:
            raise LowRankError("--bytes chooses the bits of every layer; leave --bits out")
        quantization = Quantization(self.bits or 8)
        quantization.check_here()
        return quantization

    @property
    def needs_whole(self) -> str:
        """What of the job needs the whole model in memory; "" if nothing does."""
        asked = {"--heal": self.heal, "--bits": self.bits is not None, "--statistics": self.statistics is not None}
        asked["a search for a score"] = self.search.given
        return next((f"{name} needs it" for name, is_given in asked.items() if is_given), "")

    def chosen_task(self, config: CompressionConfig) -> "Task | None":
        """The task to measure on.

        Raises:
            LowRankError: there is none, and something is to be measured; or as `DataOrTexts.reading`.
        """
        task = self.data.reading(self.task)
        needs_labels = self.search.given or config.allocation == "knapsack"
        if self.data.texts is not None and needs_labels:
            raise LowRankError("texts have no labels; budgets by score or loss, and knapsack, need a --task")
        if task is not None or self.data.texts is not None:
            return task
        measures = self.score or needs_labels or self.heal
        if config.needs or measures:
            raise LowRankError(
                f"compress needs a --task or --texts to measure on{'' if measures else f' by the method {self.method}'}"
            )
        return None


@command("compress")
def compress_command(context: typer.Context, model: ModelArgument, given: CompressOptions) -> None:
    """Compress a fine-tuned model and save it as a folder that from_pretrained loads.

    Example: hf-lowrank compress ./bert-stsb --task stsb --rank-ratio 0.2 --output ./bert-stsb-lowrank

    Without labelled data: hf-lowrank compress ./bert-stsb --texts texts.txt --output ./bert-stsb-lowrank

    Budgets: --rank-ratio, --keep, --keep-model, --params, --bytes, --flops or --latency says how small; --keep-score or
    --max-loss-increase searches for the smallest model that is still good enough.
    """
    started = time.perf_counter()
    config, quantization = given.config(), given.quantization()
    task = given.chosen_task(config)
    refuse_taken(given.output, given.job.overwrite or given.job.resume)

    from accelerate import PartialState

    from hf_lowrank.cli.work import claim, refuse_output
    from hf_lowrank.folder.hub import push_folder, refuse_without_token
    from hf_lowrank.pipeline import fitting

    claim(context, given.output, model, given.data.data_dir, given.data.texts, given.statistics)
    task = task or given.data.of_texts(model)
    if task is not None:
        task = fitting(model, task)
    replace = refuse_output(given.output, given.job.resume, given.job.overwrite)
    if given.push_to_hub is not None:
        refuse_without_token()  # before the work, not after it
    pipeline = _compressed(model, task, config, quantization, given)
    if not PartialState().is_main_process:
        return
    pipeline.save(given.output, replace)
    if given.score:
        if pipeline.task is not None and pipeline.task.is_scored:
            pipeline.score_saved(given.output)
        pipeline.compare_saved(given.output, model)
    pipeline.finish()
    if given.push_to_hub is not None:
        pipeline.facts["address"] = push_folder(given.output, given.push_to_hub)
    _show(pipeline.report, pipeline.facts, pipeline.task, given, time.perf_counter() - started)


def _compressed(
    model: str,
    task: "Task | None",
    config: CompressionConfig,
    quantization: Quantization | None,
    given: CompressOptions,
) -> "Pipeline":
    """The model called `model`, compressed, and scored before if that was asked for."""
    from hf_lowrank.cli.work import begun_by_blocks, planned_memory, work_folder
    from hf_lowrank.folder.loading import load_trained
    from hf_lowrank.pipeline import Pipeline
    from hf_lowrank.statistics import Statistics

    begun = begun_by_blocks(work_folder(given.output)) if given.job.resume else None
    asked = given.blockwise if begun is None or given.blockwise != "auto" else "on" if begun else "off"
    plan = planned_memory(model, task, config, asked, given.calibration.batch_size, given.needs_whole)
    place, by_blocks = (None, False) if plan is None else (plan.place, plan.by_blocks)
    options = {"device": place, "quantization": quantization, "blockwise": by_blocks, **vars(given.calibration)}
    pipeline = Pipeline.load(model, task, given.data.data_dir, **options)
    measured = Statistics.load(given.statistics) if given.statistics is not None and config.needs else None
    config = pipeline.prepared(config, measured)
    if given.heal:
        pipeline.check_dense()
    pipeline.facts["memory"] = None if plan is None else plan.estimate.to_dict()
    if given.score and task is not None and task.is_scored:
        pipeline.score_dense()
    if measured is not None and given.calibration.labels is not None:
        measured.check_labels(given.calibration.labels)
    settings = asdict(config) | vars(given.search) | ({"heal": True} if given.heal else {})
    settings |= {"bits": given.bits} if given.bits is not None else {}
    source: Any = (given.statistics, bool(config.needs))
    pipeline.begin(work_folder(given.output), settings, *source, **vars(given.job))
    if given.search.given:
        pipeline.search(config, measured, **vars(given.search))
    else:
        pipeline.compress(config, measured)
    if given.heal and pipeline.task is not None:
        pipeline.heal(load_trained(model, pipeline.task))
    return pipeline


def _show(report: Any, facts: dict[str, Any], task: "Task | None", given: CompressOptions, seconds: float) -> None:
    """What became of the model."""
    from hf_lowrank.training.divergence import Divergence

    if given.as_json:
        return print_json({**facts, "output": str(given.output), **report.to_dict()})
    console.print(report if given.verbose else report.summary(), highlight=False)
    if "healing" in facts:
        from hf_lowrank.cli.heal import healed_line

        console.print(healed_line(facts["healing"]), highlight=False)
    if "score_compressed" in facts and task is not None:
        before = "given" if "score_given" in facts else "dense"
        console.print(
            f"{task.score} {facts[f'score_{before}']:.2f} {before} → {facts['score_compressed']:.2f} compressed"
        )
    if given.score:
        console.print(str(Divergence.from_dict(facts["divergence"]["compressed"])), highlight=False)
    if given.push_to_hub is not None:
        console.print(f"pushed to {given.push_to_hub}: {facts['address']}", highlight=False)
    console.print(f"saved to {given.output} after {seconds:.0f} s", highlight=False)
