"""hf-lowrank methods: the family of objectives."""

from rich.table import Table

from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console
from hf_lowrank.solvers import METHODS


@app.command("methods")
def methods_command() -> None:
    """List the methods: what each one minimises, what it needs, where it comes from."""
    table = Table("method", "minimises", "needs", "ranks", "source", box=None, title="Δ = W − up @ down")
    for method in METHODS.values():
        table.add_row(
            method.name, method.formula, ", ".join(method.needs) or "nothing", method.allocation, method.source
        )
    console.print(table)
