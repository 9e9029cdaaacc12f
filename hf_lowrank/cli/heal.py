"""hf-lowrank heal: a compressed model's factors trained to say what the dense model says, without labels."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import DataOrTexts, JsonOption, ModelArgument, OverwriteOption, refuse_taken
from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.table import NAMES
from hf_lowrank.training.settings import HealConfig

if TYPE_CHECKING:
    from hf_lowrank.tasks.task import Task

DEFAULTS = HealConfig()


@dataclass(frozen=True)
class HealingOptions:
    """How to heal: the fields of `HealConfig` of these names."""

    samples: Annotated[
        int | None,
        typer.Option(
            help="Training texts to learn from. "
            "[dim]Default: a quarter of all, but at least 2,048 and at most 4,096; of windows 2,048 × 128 tokens.[/dim]"
        ),
    ] = None
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = DEFAULTS.epochs
    held_out: Annotated[int, typer.Option(help="Other training texts to judge by.")] = DEFAULTS.held_out
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="A learning rate to try; may be repeated, the best one goes on. [dim]Default: "
            f"{', '.join(f'{rate:g}' for rate in DEFAULTS.rates)}.[/dim]"
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Texts of a step, over all processes.")] = DEFAULTS.batch_size
    accumulate: Annotated[int, typer.Option(help="Parts of a step, where memory is short.")] = DEFAULTS.accumulate
    hidden: Annotated[float, typer.Option(help="Weight of the hidden states' errors at first; it falls to 0.")] = (
        DEFAULTS.hidden
    )
    patience: Annotated[int, typer.Option(help="Stop after so many measurements without getting nearer.")] = (
        DEFAULTS.patience
    )
    seed: Annotated[int, typer.Option(help="Which texts, and their order.")] = DEFAULTS.seed
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe; factors stay float32. Faster.")
    ] = False

    @property
    def settings(self) -> dict[str, Any]:
        """Those of `HealConfig`."""
        rest = {name: value for name, value in vars(self).items() if name != "rate"}
        return rest | {"rates": tuple(self.rate or DEFAULTS.rates)}


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """The options of `hf-lowrank heal`, in the order of its help."""

    teacher: Annotated[str, typer.Option(help="The dense model that it was made from, a folder or a Hub name.")]
    output: Annotated[Path, typer.Option(help="Where the healed model goes.")]
    task: Annotated[str | None, typer.Option(help=f"Whose training texts are read: {', '.join(NAMES)}.")] = None
    data: DataOrTexts
    healing: HealingOptions
    score: Annotated[bool, typer.Option("--evaluate", help="Score the result on the validation data.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run of this output was.")] = False
    overwrite: OverwriteOption = False
    as_json: JsonOption = False

    @property
    def checkpoints(self) -> Path:
        """Where unfinished work is."""
        return self.output.with_name(f"{self.output.name}.checkpoints")


@command("heal")
def heal_command(context: typer.Context, model: ModelArgument, given: HealOptions) -> None:
    """Train the factors of a compressed model for a few minutes to say what the dense model says. It takes no labels.

    It never ends farther from the dense model than it began, on texts that are held out: then it stays as it was.
    Checkpoints lie in OUTPUT.checkpoints until the end.

    Example: hf-lowrank heal ./bert-stsb-lowrank --teacher ./bert-stsb --task stsb --output ./bert-stsb-healed
    """
    task = given.data.reading(given.task)
    HealConfig(**given.healing.settings)  # raises
    if task is None and given.data.texts is None:
        raise LowRankError("healing reads texts: give a --task, or --texts FILE")
    refuse_taken(given.output, given.overwrite or given.resume)

    from accelerate import PartialState

    from hf_lowrank.cli.work import claim, refuse_output
    from hf_lowrank.folder.facts import public_name
    from hf_lowrank.folder.loading import load_model
    from hf_lowrank.pipeline import fitting

    claim(context, given.output, model, given.data.data_dir, given.data.texts, given.teacher)
    task = task or given.data.of_texts(model)
    assert task is not None
    task = fitting(model, task)
    replace = refuse_output(given.output, given.resume, given.overwrite, given.checkpoints)
    if given.overwrite and not given.resume and PartialState().is_main_process:
        shutil.rmtree(given.checkpoints, ignore_errors=True)
    PartialState().wait_for_everyone()
    loaded, tokenizer = load_model(model, task)
    healing, teacher = _healed(loaded, tokenizer, task, model, given)
    if not PartialState().is_main_process:
        return
    facts = _saved(loaded, tokenizer, teacher, task, model, healing, replace, given)
    if given.as_json:
        return print_json({"model": public_name(model), "output": str(given.output), **facts, "healing": healing})
    _show(facts, healing, task, given)


def _healed(loaded: Any, tokenizer: Any, task: "Task", model: str, given: HealOptions) -> tuple[dict[str, Any], Any]:
    """Heal the model in place; the facts of it, and the teacher."""
    from hf_lowrank.folder.facts import public_name, versions
    from hf_lowrank.folder.loading import load_trained, stored_dtype
    from hf_lowrank.folder.sentences import read_sentences
    from hf_lowrank.tasks.data import data_name
    from hf_lowrank.training.heal import heal

    teacher, sentences = load_trained(given.teacher, task), read_sentences(model)
    facts = heal(
        loaded,
        teacher,
        tokenizer,
        task,
        given.data.data_dir,
        dtype=stored_dtype(model),
        checkpoints=given.checkpoints,
        resume=given.resume,
        readout=None if sentences is None else sentences.readout,
        **given.healing.settings,
    )
    described = {"teacher": public_name(given.teacher), "data": data_name(task, given.data.data_dir)}
    return facts | described | {"versions": versions()}, teacher


def _saved(
    loaded: Any,
    tokenizer: Any,
    teacher: Any,
    task: "Task",
    model: str,
    healing: dict[str, Any],
    replace: bool,
    given: HealOptions,
) -> dict[str, Any]:
    """Save the model with its record, if it has one; its score and divergence as a user gets it, if asked for."""
    from hf_lowrank.folder.healed import healed_kind, healed_record
    from hf_lowrank.folder.loading import load_model, stored_dtype
    from hf_lowrank.folder.saving import add_facts, read_record, save_model
    from hf_lowrank.folder.scores import with_divergence, with_score
    from hf_lowrank.folder.sentences import read_sentences
    from hf_lowrank.jobs.checkpoint import Work
    from hf_lowrank.pipeline import Pipeline

    record = read_record(model)
    record = None if record is None else healed_record(record, healing)
    Work(given.checkpoints).mark_saving()
    save_model(loaded, tokenizer, given.output, replace, stored_dtype(model), record)
    found: dict[str, Any] = {}
    if given.score:
        saved, _ = load_model(str(given.output), task)
        pipeline = Pipeline(saved, tokenizer, task, given.data.data_dir, sentences=read_sentences(model))
        data, kind = pipeline.scored_on, healed_kind(record or {})
        found = with_divergence(record or {}, kind, pipeline.divergence(teacher).to_dict(), data)
        if task.is_scored:
            found |= with_score(record or {}, kind, pipeline.score()["score"], data)
    if found and record is not None:
        add_facts(given.output, **found)
    shutil.rmtree(given.checkpoints, ignore_errors=True)
    return found


def _show(facts: dict[str, Any], healing: dict[str, Any], task: "Task", given: HealOptions) -> None:
    """What became of the model."""
    console.print(healed_line(healing), highlight=False)
    for key, score in facts.items():
        if key.startswith("score_"):
            console.print(f"{task.score} {score:.2f}", highlight=False)
    console.print(f"saved to {given.output} after {healing['seconds']:.0f} s of healing", highlight=False)


def healed_line(healing: dict[str, Any]) -> str:
    """What a healing came to, in a sentence."""
    before, after = healing["divergence_before"], healing["divergence_after"]
    if not healing["healed"]:
        return f"healing found nothing nearer to the dense model than {before:.4g} nats: the factors are as they were"
    return (
        f"healed: {before:.4g} → {after:.4g} nats from the dense model on {healing['held_out']} held-out texts, by "
        f"{healing['samples']} others at the rate {healing['learning_rate']:g}"
    )
