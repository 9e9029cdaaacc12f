"""hf-lowrank inspect: what was factorized in a saved model."""

from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption, ModelArgument
from hf_lowrank.inspection import inspect, ranks_table


@app.command("inspect")
def inspect_command(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show what was factorized in a saved model, at which ranks, and what it cost."""
    facts = inspect(model)
    if as_json:
        return print_json(facts)
    size = f", {facts['bytes'] / 1e6:.1f} MB of weights" if facts["bytes"] else ""
    console.print(f"{facts['architecture']}, {facts['dtype']}{size}")
    share = facts["parameters"] / facts["parameters_dense"]
    console.print(f"{facts['parameters']:,} parameters, {share:.1%} of the dense model's {facts['parameters_dense']:,}")
    if record := facts["record"]:
        console.print(
            f"made from {record['base_model']} for {record['task']} by {record['settings']['method']} "
            f"at rank ratio {record['settings']['rank_ratio']}"
        )
    console.print(ranks_table(facts["layers"]))
