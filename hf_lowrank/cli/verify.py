"""hf-lowrank verify: is a saved model whole, and the one that its record describes?"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption


@command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="A folder with a compressed model.", metavar="DIR")],
    against: Annotated[str | None, typer.Option(help="The dense model it was made from, to compare with.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a saved model: files, shapes, finite weights, and that it computes what it did when it was saved.

    The exit code is 1 if a check fails.

    Example: hf-lowrank verify ./bert-stsb-lowrank --against ./bert-stsb
    """
    from hf_lowrank.folder.verify import FAIL, verify

    checks = verify(folder, against)
    failed = sum(check.status == FAIL for check in checks)
    if as_json:
        print_json({"passed": not failed, "checks": [asdict(check) for check in checks]})
    else:
        table = Table("check", "result", "evidence", box=None)
        for check in checks:
            table.add_row(check.name, check.status, check.detail)
        console.print(table)
        console.print(f"{failed} of {len(checks)} checks failed" if failed else f"{folder} is whole", highlight=False)
    if failed:
        raise typer.Exit(1)
