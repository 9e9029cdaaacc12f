"""hf-lowrank experiment: a recipe, from fine-tuning to the papers' tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption

if TYPE_CHECKING:
    from hf_lowrank.studies.experiment.store import Store


@dataclass(frozen=True)
class ExperimentOptions:
    """The options of `hf-lowrank experiment`, in the order of its help."""

    output: Annotated[
        Path | None, typer.Option(help="Where records and tables go. Default: the recipe's name + '-results'.")
    ] = None
    data_dir: Annotated[
        Path | None, typer.Option(help="A folder with one folder of data for each task. Default: the Hub.")
    ] = None
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Save every compressed model in OUTPUT/models.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the steps, and which are done.")] = False
    as_json: JsonOption = False


@command("experiment")
def experiment_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, as in examples/recipes.", metavar="RECIPE")],
    given: ExperimentOptions,
) -> None:
    """Fine-tune, compress, score, fine-tune and score again, as a recipe says; tables like the papers' come out.

    Every result is kept at once, and skipped by the next run of the same command: it may be stopped at any time.
    Recipes that share models may share OUTPUT, so that nothing is trained twice.

    Example: hf-lowrank experiment examples/recipes/minilm-l6-path3.yaml --output ./path3
    """
    from accelerate import PartialState

    from hf_lowrank.studies.experiment import load_recipe, run_recipe, tables_of
    from hf_lowrank.studies.experiment.store import Store
    from hf_lowrank.studies.experiment.tables import rows_of

    the_recipe = load_recipe(recipe)
    folder = given.output or Path(f"{recipe.stem}-results")
    store = Store(folder)
    if given.dry_run:
        return _list_steps(the_recipe, folder, store, given.as_json)
    run_recipe(the_recipe, folder, given.data_dir, given.keep_models, _say)
    if PartialState().is_main_process:
        if given.as_json:
            return print_json({"rows": [vars(row) for row in rows_of(the_recipe, store)]})
        print(tables_of(the_recipe, store))


def _list_steps(recipe: Any, folder: Path, store: "Store", as_json: bool) -> None:
    from hf_lowrank.studies.experiment import plan_of
    from hf_lowrank.studies.experiment.run import steps_of

    steps = [step for dense, runs in plan_of(recipe) for step in steps_of(dense, runs)]
    done = {name: store.get(name, settings) is not None for name, settings in steps}
    if as_json:
        return print_json({name: {"done": is_done} for name, is_done in done.items()})
    for name, is_done in done.items():
        console.print(f"{'done' if is_done else '    '}  {name}", highlight=False, soft_wrap=True)
    console.print(f"{len(steps)} steps, {sum(done.values())} done; records in {folder}", highlight=False)


def _say(line: str) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(line, err=True)
