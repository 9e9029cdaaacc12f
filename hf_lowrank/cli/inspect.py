"""hf-lowrank inspect: what was factorized in a saved model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowrank.allocation.budget import BUDGETS
from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption, ModelArgument


@app.command("inspect")
def inspect_command(
    model: ModelArgument,
    plot: Annotated[Path | None, typer.Option(help="Draw the rank of every layer into this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was factorized in a saved model, at which ranks, and what it cost."""
    from hf_lowrank.compression.report import described
    from hf_lowrank.folder.inspect import inspect, ranks_table
    from hf_lowrank.folder.picture import ranks_figure
    from hf_lowrank.folder.style import save_png

    facts = inspect(model)
    if plot is not None:
        save_png(ranks_figure(facts["layers"]), plot)
    if as_json:
        return print_json(facts)
    size = f", {facts['bytes'] / 1e6:.1f} MB of weights" if facts["bytes"] else ""
    console.print(f"{facts['architecture']}, {facts['dtype']}{size}")
    share = facts["parameters"] / facts["parameters_dense"]
    console.print(f"{facts['parameters']:,} parameters, {share:.1%} of the dense model's {facts['parameters_dense']:,}")
    if record := facts["record"]:
        for step in record.get("earlier", ()):
            console.print(described(step))
        console.print(
            f"made from {record['base_model'] or 'a model'} for {record['task']} by {record['settings']['method']}, "
            f"{_budget(record['settings'])}, ranks {record['settings']['allocation']}"
        )
    console.print(ranks_table(facts["layers"]))


def _budget(settings: dict[str, Any]) -> str:
    given = {kind: settings[kind] for kind in BUDGETS if settings.get(kind) is not None}
    return ", ".join(f"{kind} {value}" for kind, value in given.items())
