"""hf-lowrank densify: back to an ordinary dense checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console
from hf_lowrank.cli.options import OverwriteOption, refuse_taken


@command("densify")
def densify_command(
    folder: Annotated[Path, typer.Argument(help="A folder with a compressed model.", metavar="DIR")],
    output: Annotated[Path, typer.Argument(help="Where the dense model goes.", metavar="OUT")],
    overwrite: OverwriteOption = False,
) -> None:
    """Turn a compressed model back into an ordinary checkpoint of its base class, for engines that know only that.

    It computes the same, at the size and speed of the dense model: llama.cpp's converter and engines without
    transformers read it.

    Example: hf-lowrank densify ./bert-stsb-lowrank ./bert-stsb-dense
    """
    refuse_taken(output, overwrite)

    from hf_lowrank.cli.work import refuse_inputs
    from hf_lowrank.folder.densify import densify_folder

    refuse_inputs(output, folder)
    model = densify_folder(folder, output, overwrite)
    console.print(f"saved to {output}: {type(model).__name__}, {model.num_parameters():,} parameters", highlight=False)
