"""hf-lowrank finetune: train a model on a task, dense or compressed, with or without a teacher."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    DataOption,
    JsonOption,
    LabelColumnOption,
    LengthOption,
    ModelArgument,
    OverwriteOption,
    TaskOption,
    TextColumnOption,
    refuse_taken,
)
from hf_lowrank.tasks.table import get_task
from hf_lowrank.training.settings import FinetuneConfig


@app.command("finetune")
def finetune_command(
    context: typer.Context,
    model: ModelArgument,
    task: TaskOption,
    output: Annotated[Path, typer.Option(help="Where the fine-tuned model goes.")],
    data_dir: DataOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(help="Rows of a step, over all processes.")] = 32,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: linear (to 0) or constant.")] = "linear",
    max_length: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Of a new head, the order of the rows, and dropout.")] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe; weights stay float32. Faster.")
    ] = False,
    layers: Annotated[
        int | None, typer.Option(help="Keep only the first so many transformer layers of a dense model.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many epochs without a better score, keep the best. Default: never."),
    ] = None,
    evaluate_epochs: Annotated[bool, typer.Option("--evaluate-epochs", help="Score after every epoch.")] = False,
    teacher: Annotated[
        str | None, typer.Option(help="Also learn from this model of the same task, such as the dense one.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the teacher's and the model's logits.")] = 2.0,
    logits_weight: Annotated[float, typer.Option(help="Of the teacher's logits; the labels have the rest.")] = 0.5,
    hidden_weight: Annotated[float, typer.Option(help="Of the teacher's hidden states, 0 for none.")] = 1.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of this output was.")
    ] = False,
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="A checkpoint after so many steps. Default: after every epoch.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model on a task, before or after compression. The defaults are the papers'.

    A dense model without a head for the task gets a new one. Checkpoints lie in OUTPUT.checkpoints until the end.

    Example: hf-lowrank finetune ./bert-stsb-lowrank --task stsb --output ./bert-stsb-lowrank-tuned
    """
    the_task = get_task(task, max_length, data_dir=data_dir, text_columns=text_column, label_column=label_column)
    settings: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
    }
    settings |= {"schedule": schedule, "bf16": bf16, "patience": patience, "evaluate_epochs": evaluate_epochs}
    FinetuneConfig(**settings)  # raises
    refuse_taken(output, overwrite or resume)

    from accelerate import PartialState

    from hf_lowrank.cli.facts import public_name, versions
    from hf_lowrank.cli.work import claim, refuse_output
    from hf_lowrank.folder.loading import load_for_finetuning, load_model, load_trained, stored_dtype
    from hf_lowrank.folder.saving import add_facts, read_record, save_model
    from hf_lowrank.folder.scores import comparable, why_not, with_score
    from hf_lowrank.jobs.checkpoint import Work
    from hf_lowrank.training.distillation import Distillation
    from hf_lowrank.training.evaluate import evaluate_described
    from hf_lowrank.training.finetune import finetune

    claim(context, output, model, data_dir, teacher)
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    replace = refuse_output(output, resume, overwrite, checkpoints)
    if overwrite and not resume and PartialState().is_main_process:
        shutil.rmtree(checkpoints, ignore_errors=True)
    PartialState().wait_for_everyone()
    loaded, tokenizer, fresh = load_for_finetuning(model, the_task, seed, layers)
    distillation = None
    if teacher is not None:
        distillation = Distillation(load_trained(teacher, the_task), temperature, logits_weight, hidden_weight)
    facts = finetune(
        loaded, tokenizer, the_task, data_dir, **settings, distillation=distillation, checkpoints=checkpoints,
        checkpoint_steps=checkpoint_steps, resume=resume, score=False,
    )  # fmt: skip
    if not PartialState().is_main_process:
        return
    described: dict[str, Any] = {"teacher": public_name(teacher)} if teacher else {}
    finetuning = facts | described | {"versions": versions()}
    record = read_record(model)
    if record is not None:
        record |= {"finetuning": finetuning}
    Work(checkpoints).mark_saving()
    save_model(loaded, tokenizer, output, replace, stored_dtype(model), record)
    loaded_back = load_model(str(output), the_task)  # as a user gets it
    metrics, scored_on = evaluate_described(*loaded_back, the_task, data_dir)
    if record is not None:
        found = with_score(record, "finetuned", metrics["score"], scored_on)
        record |= found
        add_facts(output, **found)
    shutil.rmtree(checkpoints, ignore_errors=True)
    if as_json:
        parameters = loaded.num_parameters()
        return print_json(
            {"model": public_name(model), "task": the_task.name, "output": str(output), "parameters": parameters}
            | {"new_parameters": fresh, "score": metrics["score"], "metrics": metrics, "finetuning": finetuning}
        )
    if fresh:
        console.print(f"new, drawn by seed {seed}: {', '.join(fresh)}")
    for epoch in facts["history"]:
        console.print(", ".join(f"{name} {value:.4g}" for name, value in epoch.items()), highlight=False)
    before = ""
    if record is not None and "score_compressed" in record:
        if comparable(record, "compressed", "finetuned"):
            before = f"{record['score_compressed']:.2f} → "
        else:
            console.print(why_not(record, "compressed", "finetuned"), highlight=False)
    console.print(
        f"{the_task.score} {before}{metrics['score']:.2f} after {facts['seconds']:.0f} s of fine-tuning; "
        f"saved to {output}",
        highlight=False,
    )
    if metrics.get("degenerate"):
        console.print("warning: every prediction is the same; the model has collapsed")
