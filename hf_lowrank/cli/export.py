"""hf-lowrank export: a model as ONNX."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console
from hf_lowrank.errors import LowRankError


@command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(help="A folder with a model, compressed or dense.", metavar="DIR")],
    output: Annotated[Path, typer.Argument(help="The ONNX file to write.", metavar="OUT.onnx")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a model as ONNX with free batch and length, factors as factors, and check it in ONNX Runtime.

    Needs the packages of the extra "export": pip install onnx onnxruntime onnxscript

    Example: hf-lowrank export ./bert-stsb-lowrank bert-stsb.onnx
    """
    if output.exists() and not overwrite:
        raise LowRankError(f"{output} exists; choose another file or pass --overwrite")

    from hf_lowrank.folder.export import export_onnx

    difference = export_onnx(folder, output)
    size = output.stat().st_size / 1e6
    console.print(f"{output}: {size:.1f} MB; ONNX Runtime differs from the model by {difference:.1e}", highlight=False)
