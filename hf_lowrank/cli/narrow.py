"""hf-lowrank narrow: a decoder whose MLPs have fewer inner channels, an ordinary model for every engine."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    CalibrationOptions,
    DataOrTexts,
    JobOptions,
    JsonOption,
    LayerOptions,
    ModelArgument,
    refuse_taken,
)
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.table import NAMES

if TYPE_CHECKING:
    from hf_lowrank.pipeline import Pipeline
    from hf_lowrank.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class NarrowOptions:
    """The options of `hf-lowrank narrow`, in the order of its help."""

    output: Annotated[Path, typer.Option(help="Where the narrower model goes.")]
    keep: Annotated[
        float, typer.Option(help="Share of the MLPs' inner channels, and so of their weights, that stays.")
    ] = 0.8
    align: Annotated[
        int,
        typer.Option(min=1, help="Make the width a multiple of this: 64 to 256 for GPUs and engines that divide it."),
    ] = 8
    task: Annotated[str | None, typer.Option(help=f"The task, not needed with --texts: {', '.join(NAMES)}.")] = None
    data: DataOrTexts
    calibration: CalibrationOptions
    score: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Score the model before and after, and compare its predictions with the dense model's, on the "
            "validation data.",
        ),
    ] = False
    job: JobOptions
    as_json: JsonOption = False


@command("narrow")
def narrow_command(context: typer.Context, model: ModelArgument, given: NarrowOptions) -> None:
    """Drop inner channels of a decoder's gated MLPs, and let the rest make up for them (Nyström, as in MoDeGPT).

    What becomes is no low-rank model but an ordinary one, with a smaller intermediate_size, which every engine runs at
    full speed. It can be compressed further like any other.

    Example: hf-lowrank narrow ./llama --keep 0.8 --texts texts.txt --output ./llama-narrow
    """
    task = given.data.reading(given.task)
    if task is None and given.data.texts is None:
        raise LowRankError("narrow needs a --task or --texts to measure on")
    refuse_taken(given.output, given.job.overwrite or given.job.resume)

    from accelerate import PartialState

    from hf_lowrank.cli.work import claim, refuse_output
    from hf_lowrank.folder.saving import save_model
    from hf_lowrank.pipeline import fitting

    claim(context, given.output, model, given.data.data_dir, given.data.texts)
    task = task or given.data.of_texts(model)
    assert task is not None
    task = fitting(model, task)
    replace = refuse_output(given.output, given.job.resume, given.job.overwrite)
    pipeline, facts = _narrowed(model, task, given)
    if not PartialState().is_main_process:
        return
    assert pipeline.work is not None
    pipeline.work.mark_saving()
    save_model(pipeline.model, pipeline.tokenizer, given.output, replace, pipeline.dtype)
    if given.score:
        facts |= _compared(model, task, given)
    pipeline.finish()
    print_json({"output": str(given.output), **facts}) if given.as_json else _show(facts, task, given)


def _narrowed(model: str, task: "Task", given: NarrowOptions) -> tuple["Pipeline", dict[str, Any]]:
    """The model called `model` with narrower MLPs, and what became of its parameters."""
    from accelerate import PartialState

    from hf_lowrank.cli.work import check_memory, work_folder
    from hf_lowrank.compression.memory import skeleton
    from hf_lowrank.compression.narrow import LAYERS, NEEDS, PARTS, gated_mlps, narrow, width_for
    from hf_lowrank.model.targets import check_weights, find_targets
    from hf_lowrank.pipeline import Pipeline

    if (empty := skeleton(model, task, PartialState().device)) is not None:
        width_for(empty, given.keep, given.align)  # raises, before weights are read
    layers = LayerOptions(include=[*LAYERS])
    _, place = check_memory(model, task, NEEDS, layers, given.calibration.batch_size)
    pipeline = Pipeline.load(model, task, given.data.data_dir, device=place, **vars(given.calibration))
    width = width_for(pipeline.model, given.keep, given.align)
    check_weights(find_targets(pipeline.model, include=[f"*.{part}" for part in PARTS]))
    pipeline.labels = pipeline.labels_for(CompressionConfig("whiten"))
    pipeline.begin(work_folder(given.output), {"narrow": width}, **vars(given.job))
    before = _parameters(pipeline.model)
    facts = {"intermediate_size_before": next(iter(gated_mlps(pipeline.model).values())).down_proj.in_features}
    narrow(pipeline.model, pipeline.measure(NEEDS, **layers.patterns), width)
    after = _parameters(pipeline.model)
    named = {f"{name}_{when}": count for when, two in (("before", before), ("after", after)) for name, count in two}
    return pipeline, {"model": pipeline.name, **facts, "intermediate_size_after": width, **named}


def _parameters(model: Any) -> list[tuple[str, int]]:
    """Those of the MLPs that can be narrower, and of the whole model."""
    from hf_lowrank.compression.narrow import gated_mlps

    inside = sum(parameter.numel() for mlp in gated_mlps(model).values() for parameter in mlp.parameters())
    return [("mlp_parameters", inside), ("parameters", model.num_parameters())]


def _compared(model: str, task: "Task", given: NarrowOptions) -> dict[str, Any]:
    """The scores of the dense model and of the saved one as a user gets it, and how far their predictions are apart."""
    from hf_lowrank.folder.loading import load_trained
    from hf_lowrank.pipeline import Pipeline

    saved = Pipeline.load(str(given.output), task, given.data.data_dir)
    dense = load_trained(model, task)
    scores: dict[str, Any] = {}
    if task.is_scored:
        scores["score_narrow"] = saved.score()["score"]
        scores["score_dense"] = Pipeline(dense, saved.tokenizer, task, given.data.data_dir).score()["score"]
    return scores | {"divergence": asdict(saved.divergence(dense))}


def _show(facts: dict[str, Any], task: "Task", given: NarrowOptions) -> None:
    """What became of the model."""
    from hf_lowrank.training.divergence import Divergence

    kept = [facts[f"{name}_after"] / facts[f"{name}_before"] for name in ("mlp_parameters", "parameters")]
    console.print(
        f"MLPs of {facts['intermediate_size_before']:,} → {facts['intermediate_size_after']:,} inner channels\n"
        f"parameters kept: {kept[0]:.1%} of the MLPs', {kept[1]:.1%} of the whole model's "
        f"({facts['parameters_before']:,} → {facts['parameters_after']:,})",
        highlight=False,
    )
    if "score_dense" in facts:
        console.print(f"{task.score} {facts['score_dense']:.2f} dense → {facts['score_narrow']:.2f} narrow")
    if "divergence" in facts:
        console.print(str(Divergence.from_dict(facts["divergence"])), highlight=False)
    console.print(f"saved to {given.output}", highlight=False)
