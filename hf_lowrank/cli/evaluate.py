"""hf-lowrank evaluate: a model's score on a task."""

from typing import Any

from rich.table import Table

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import BatchOption, DataOptions, JsonOption, ModelArgument, TaskOption


@command("evaluate")
def evaluate_command(
    model: ModelArgument,
    task: TaskOption,
    data: DataOptions,
    batch_size: BatchOption = 32,
    as_json: JsonOption = False,
) -> None:
    """Score a model, dense or compressed, on a task's whole validation data."""
    the_task = data.of_task(task)

    from accelerate import PartialState

    from hf_lowrank.folder.loading import load_model
    from hf_lowrank.tasks.labels import label_mapping
    from hf_lowrank.training.evaluate import evaluate_described

    loaded, tokenizer = load_model(model, the_task)
    result, scored_on = evaluate_described(loaded, tokenizer, the_task, data.data_dir, batch_size)
    if not PartialState().is_main_process:
        return
    facts: dict[str, Any] = {"model": model, "task": the_task.name, "parameters": loaded.num_parameters()}
    if as_json:
        return print_json({**facts, "scored_on": scored_on, "labels": label_mapping(the_task, loaded.config), **result})
    table = Table("metric", "value", box=None, title=f"{model} on {the_task.name}, {facts['parameters']:,} parameters")
    for key, value in result.items():
        if key not in ("score", "degenerate"):
            table.add_row(key, f"{value:.2f} (score)" if key == the_task.score else f"{value:.4g}")
    console.print(table)
    if result.get("degenerate"):
        console.print("warning: every prediction is the same; the model has collapsed")
