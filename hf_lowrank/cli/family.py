"""The family of methods as a table."""

from typing import Any

import typer
from rich.table import Table

from hf_lowrank.cli.console import console
from hf_lowrank.solvers.family import METHODS, Method
from hf_lowrank.statistics.names import passes


def print_methods() -> None:
    """Print what each method minimises, needs, and costs, and where it comes from."""
    table = Table("method", "minimises", "needs", "cost", "ranks", "source", box=None, title="Δ = W − up @ down")
    for method in METHODS.values():
        needs = ", ".join(method.needs) or "nothing"
        table.add_row(method.name, method.formula, needs, _cost(method), method.allocation, method.source)
    console.print(table)


def print_methods_for_help(value: Any) -> Any:
    """For an option --method, given once or repeatedly: `help` prints the family and ends."""
    if value == "help" or (isinstance(value, list) and "help" in value):
        print_methods()
        raise typer.Exit
    return value


def _cost(method: Method) -> str:
    """Passes over the calibration data, each about one of training, and the kind of solver."""
    count = len(passes(method.needs))
    data = {0: "no data", 1: "1 pass", 2: "2 passes"}.get(count, f"up to {count} passes")
    return f"{data}, {'iterates' if method.iterates else 'closed form'}"
