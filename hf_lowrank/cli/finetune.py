"""hf-lowrank finetune: train a model on a task, dense or compressed, with or without a teacher."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import DataOptions, JsonOption, ModelArgument, OverwriteOption, TaskOption, refuse_taken
from hf_lowrank.training.settings import FinetuneConfig

if TYPE_CHECKING:
    from hf_lowrank.tasks.task import Task


@dataclass(frozen=True)
class TrainingOptions:
    """How to train: the fields of `FinetuneConfig` of these names."""

    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 3
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 2e-5
    batch_size: Annotated[int, typer.Option(help="Rows of a step, over all processes.")] = 32
    schedule: Annotated[str, typer.Option(help="Of the learning rate: linear (to 0) or constant.")] = "linear"
    seed: Annotated[int, typer.Option(help="Of a new head, the order of the rows, and dropout.")] = 0
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe; weights stay float32. Faster.")
    ] = False
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many epochs without a better score, keep the best. Default: never."),
    ] = None
    evaluate_epochs: Annotated[bool, typer.Option("--evaluate-epochs", help="Score after every epoch.")] = False


@dataclass(frozen=True)
class TeacherOptions:
    """Whom to learn from besides the labels, and how much: but for its name, the arguments of `Distillation`."""

    teacher: Annotated[
        str | None, typer.Option(help="Also learn from this model of the same task, such as the dense one.")
    ] = None
    temperature: Annotated[float, typer.Option(help="Of the teacher's and the model's logits.")] = 2.0
    logits_weight: Annotated[float, typer.Option(help="Of the teacher's logits; the labels have the rest.")] = 0.5
    hidden_weight: Annotated[float, typer.Option(help="Of the teacher's hidden states, 0 for none.")] = 1.0


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The options of `hf-lowrank finetune`, in the order of its help."""

    task: TaskOption
    output: Annotated[Path, typer.Option(help="Where the fine-tuned model goes.")]
    data: DataOptions
    training: TrainingOptions
    layers: Annotated[
        int | None, typer.Option(help="Keep only the first so many transformer layers of a dense model.")
    ] = None
    teaching: TeacherOptions
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run of this output was.")] = False
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="A checkpoint after so many steps. Default: after every epoch.")
    ] = None
    overwrite: OverwriteOption = False
    as_json: JsonOption = False

    @property
    def checkpoints(self) -> Path:
        """Where unfinished work is."""
        return self.output.with_name(f"{self.output.name}.checkpoints")


@command("finetune")
def finetune_command(context: typer.Context, model: ModelArgument, given: FinetuneOptions) -> None:
    """Fine-tune a model on a task, before or after compression. The defaults are the papers'.

    A dense model without a head for the task gets a new one. Checkpoints lie in OUTPUT.checkpoints until the end.

    Example: hf-lowrank finetune ./bert-stsb-lowrank --task stsb --output ./bert-stsb-lowrank-tuned
    """
    task = given.data.of_task(given.task)
    FinetuneConfig(**vars(given.training))  # raises
    refuse_taken(given.output, given.overwrite or given.resume)

    from accelerate import PartialState

    from hf_lowrank.cli.work import claim, refuse_output
    from hf_lowrank.folder.facts import public_name
    from hf_lowrank.folder.loading import load_for_finetuning

    claim(context, given.output, model, given.data.data_dir, given.teaching.teacher)
    replace = refuse_output(given.output, given.resume, given.overwrite, given.checkpoints)
    if given.overwrite and not given.resume and PartialState().is_main_process:
        shutil.rmtree(given.checkpoints, ignore_errors=True)
    PartialState().wait_for_everyone()
    loaded, tokenizer, fresh = load_for_finetuning(model, task, given.training.seed, given.layers)
    finetuning = _trained(loaded, tokenizer, task, given)
    if PartialState().is_main_process:
        record, metrics = _saved(loaded, tokenizer, model, task, finetuning, replace, given)
        if given.as_json:
            described: dict[str, Any] = {"model": public_name(model), "task": task.name, "output": str(given.output)}
            described |= {"parameters": loaded.num_parameters(), "new_parameters": fresh}
            return print_json(described | {"score": metrics["score"], "metrics": metrics, "finetuning": finetuning})
        _show(fresh, finetuning, metrics, record, task, given)


def _trained(loaded: Any, tokenizer: Any, task: "Task", given: FinetuneOptions) -> dict[str, Any]:
    """Train the model in place; the facts of it."""
    from hf_lowrank.folder.facts import public_name, versions
    from hf_lowrank.folder.loading import load_trained
    from hf_lowrank.training.distillation import Distillation
    from hf_lowrank.training.finetune import finetune

    name, temperature, *weights = vars(given.teaching).values()
    distillation = None if name is None else Distillation(load_trained(name, task), temperature, *weights)
    facts = finetune(
        loaded,
        tokenizer,
        task,
        given.data.data_dir,
        **vars(given.training),
        distillation=distillation,
        checkpoints=given.checkpoints,
        checkpoint_steps=given.checkpoint_steps,
        resume=given.resume,
        score=False,
    )
    return facts | ({"teacher": public_name(name)} if name else {}) | {"versions": versions()}


def _saved(
    loaded: Any,
    tokenizer: Any,
    model: str,
    task: "Task",
    finetuning: dict[str, Any],
    replace: bool,
    given: FinetuneOptions,
) -> tuple[dict[str, Any] | None, dict[str, float]]:
    """Save the model; its record, where it has one, and its score as a user gets it: loaded back."""
    from hf_lowrank.folder.loading import load_model, stored_dtype
    from hf_lowrank.folder.saving import add_facts, read_record, save_model
    from hf_lowrank.folder.scores import with_score
    from hf_lowrank.jobs.checkpoint import Work
    from hf_lowrank.training.evaluate import evaluate_described

    record = read_record(model)
    if record is not None:
        record |= {"finetuning": finetuning}
    Work(given.checkpoints).mark_saving()
    save_model(loaded, tokenizer, given.output, replace, stored_dtype(model), record)
    metrics, scored_on = evaluate_described(*load_model(str(given.output), task), task, given.data.data_dir)
    if record is not None:
        found = with_score(record, "finetuned", metrics["score"], scored_on)
        record |= found
        add_facts(given.output, **found)
    shutil.rmtree(given.checkpoints, ignore_errors=True)
    return record, metrics


def _show(
    fresh: list[str],
    finetuning: dict[str, Any],
    metrics: dict[str, float],
    record: dict[str, Any] | None,
    task: "Task",
    given: FinetuneOptions,
) -> None:
    """What became of the model."""
    from hf_lowrank.folder.scores import comparable, why_not

    if fresh:
        console.print(f"new, drawn by seed {given.training.seed}: {', '.join(fresh)}")
    for epoch in finetuning["history"]:
        console.print(", ".join(f"{name} {value:.4g}" for name, value in epoch.items()), highlight=False)
    before = ""
    if record is not None and "score_compressed" in record:
        if comparable(record, "compressed", "finetuned"):
            before = f"{record['score_compressed']:.2f} → "
        else:
            console.print(why_not(record, "compressed", "finetuned"), highlight=False)
    console.print(
        f"{task.score} {before}{metrics['score']:.2f} after {finetuning['seconds']:.0f} s of fine-tuning; "
        f"saved to {given.output}",
        highlight=False,
    )
    if metrics.get("degenerate"):
        console.print("warning: every prediction is the same; the model has collapsed")
