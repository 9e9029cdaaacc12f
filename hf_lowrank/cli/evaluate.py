"""hf-lowrank evaluate: a model's score on a task."""

from rich.table import Table

from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    BatchOption,
    DataOption,
    JsonOption,
    LabelColumnOption,
    LengthOption,
    ModelArgument,
    TaskOption,
    TextColumnOption,
)
from hf_lowrank.tasks.table import get_task


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    task: TaskOption,
    data_dir: DataOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    batch_size: BatchOption = 32,
    max_length: LengthOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model, dense or compressed, on a task's whole validation data."""
    the_task = get_task(task, max_length, data_dir=data_dir, text_columns=text_column, label_column=label_column)

    from accelerate import PartialState

    from hf_lowrank.folder.loading import load_model
    from hf_lowrank.tasks.labels import label_mapping
    from hf_lowrank.training.evaluate import evaluate_described

    loaded, tokenizer = load_model(model, the_task)
    result, scored_on = evaluate_described(loaded, tokenizer, the_task, data_dir, batch_size)
    if not PartialState().is_main_process:
        return
    if as_json:
        facts = {"model": model, "task": the_task.name, "parameters": loaded.num_parameters(), "scored_on": scored_on}
        return print_json({**facts, "labels": label_mapping(the_task, loaded.config), **result})
    table = Table(
        "metric", "value", box=None, title=f"{model} on {the_task.name}, {loaded.num_parameters():,} parameters"
    )
    for key, value in result.items():
        if key not in ("score", "degenerate"):
            table.add_row(key, f"{value:.2f} (score)" if key == the_task.score else f"{value:.4g}")
    console.print(table)
    if result.get("degenerate"):
        console.print("warning: every prediction is the same; the model has collapsed")
