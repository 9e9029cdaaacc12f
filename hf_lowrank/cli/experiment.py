"""hf-lowrank experiment: a recipe, from fine-tuning to the papers' tables."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption


@app.command("experiment")
def experiment_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, as in examples/recipes.", metavar="RECIPE")],
    output: Annotated[
        Path | None, typer.Option(help="Where records and tables go. Default: the recipe's name + '-results'.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="A folder with one folder of data for each task. Default: the Hub.")
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Save every compressed model in OUTPUT/models.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the steps, and which are done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune, compress, score, fine-tune and score again, as a recipe says; tables like the papers' come out.

    Every result is kept at once, and skipped by the next run of the same command: it may be stopped at any time.
    Recipes that share models may share OUTPUT, so that nothing is trained twice.

    Example: hf-lowrank experiment examples/recipes/minilm-l6-path3.yaml --output ./path3
    """
    from accelerate import PartialState

    from hf_lowrank.studies.experiment import load_recipe, plan_of, run_recipe, tables_of
    from hf_lowrank.studies.experiment.run import steps_of
    from hf_lowrank.studies.experiment.store import Store
    from hf_lowrank.studies.experiment.tables import rows_of

    the_recipe = load_recipe(recipe)
    folder = output or Path(f"{recipe.stem}-results")
    store = Store(folder)
    if dry_run:
        steps = [step for dense, runs in plan_of(the_recipe) for step in steps_of(dense, runs)]
        done = [store.get(name, settings) is not None for name, settings in steps]
        if as_json:
            return print_json({name: {"done": is_done} for (name, _), is_done in zip(steps, done, strict=True)})
        for (name, _), is_done in zip(steps, done, strict=True):
            console.print(f"{'done' if is_done else '    '}  {name}", highlight=False, soft_wrap=True)
        return console.print(f"{len(steps)} steps, {sum(done)} done; records in {folder}", highlight=False)
    run_recipe(the_recipe, folder, data_dir, keep_models, _say)
    if PartialState().is_main_process:
        if as_json:
            return print_json({"rows": [vars(row) for row in rows_of(the_recipe, store)]})
        print(tables_of(the_recipe, store))


def _say(line: str) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(line, err=True)
