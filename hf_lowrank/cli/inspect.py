"""hf-lowrank inspect: what was factorized in a saved model."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption, ModelArgument


@command("inspect")
def inspect_command(
    model: ModelArgument,
    plot: Annotated[Path | None, typer.Option(help="Draw the rank of every layer into this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was factorized in a saved model, at which ranks, and what it cost.

    Example: hf-lowrank inspect ./bert-stsb-lowrank --plot ranks.png
    """
    from hf_lowrank.folder.inspect import inspect, ranks_table, summary
    from hf_lowrank.folder.picture import ranks_figure
    from hf_lowrank.folder.style import save_png

    facts = inspect(model)
    if plot is not None:
        save_png(ranks_figure(facts["layers"]), plot)
    if as_json:
        return print_json(facts)
    console.print(summary(facts), highlight=False)
    console.print(ranks_table(facts["layers"]))
