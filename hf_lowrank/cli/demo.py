"""hf-lowrank demo: the embedded example."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption, OverwriteOption


@command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="Where the best compressed model goes.")] = Path("hf-lowrank-demo"),
    seed: Annotated[int, typer.Option(help="Of the generated data and the training.")] = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a small BERT on a generated task, compress it by four methods at three ranks, compare. No download."""
    from hf_lowrank.studies.demo import results_table, run_demo

    record = run_demo(output, seed, overwrite)
    if as_json:
        return print_json(record)
    console.print(results_table(record))
    console.print(
        f"the best is saved in {output}, and scores the same after AutoModel loaded it back; "
        f"{record['seconds']:.0f} s in all. Look into it with: hf-lowrank inspect {output}",
        highlight=False,
    )
