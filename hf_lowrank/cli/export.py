"""hf-lowrank export: a model as ONNX."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console
from hf_lowrank.cli.options import DataOptions
from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.table import NAMES

if TYPE_CHECKING:
    from hf_lowrank.tasks.task import Task


@command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(help="A folder with a model, compressed or dense.", metavar="DIR")],
    output: Annotated[
        Path, typer.Argument(help="The ONNX file to write; of an encoder-decoder a folder of two.", metavar="OUT.onnx")
    ],
    data: DataOptions,
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights of 8 bits, activations rounded as they come: the fastest on CPUs.")
    ] = False,
    reduce_range: Annotated[
        bool,
        typer.Option("--reduce-range", help="With --int8, weights of 7 bits: for x86 CPUs without VNNI."),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(help=f"With --int8, score it before and after on the validation data: {', '.join(NAMES)}."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a model as ONNX with free batch and length, factors as factors, and check it in ONNX Runtime.

    Of an encoder-decoder there are two graphs, encoder_model.onnx and decoder_model.onnx, in a folder. Caches are not
    exported: language models answer whole sequences. Needs the extra "export": pip install onnx onnxruntime onnxscript

    Example: hf-lowrank export ./bert-stsb-lowrank bert-stsb.onnx
    """
    if output.exists() and not overwrite:
        raise LowRankError(f"{output} exists; choose another file or pass --overwrite")
    if not int8 and (reduce_range or task is not None):
        raise LowRankError("--reduce-range and --task go with --int8")
    if int8:
        return _int8(folder, output, reduce_range, None if task is None else data.of_task(task), data.data_dir)

    from hf_lowrank.folder.export import export_onnx
    from hf_lowrank.folder.onnx_runtime import megabytes

    difference = export_onnx(folder, output)
    said = f"{output}: {megabytes(output):.1f} MB; ONNX Runtime differs from the model by {difference:.1e}"
    console.print(said, highlight=False)


def _int8(folder: Path, output: Path, reduce_range: bool, task: "Task | None", data_dir: Path | None) -> None:
    from hf_lowrank.folder.export_int8 import export_int8
    from hf_lowrank.pipeline import fitting

    task = None if task is None else fitting(str(folder), task)
    told = export_int8(folder, output, reduce_range, None if task is None else _score(folder, task, data_dir))
    before, after = told.megabytes
    console.print(
        f"{output}: {before:.1f} MB in float32 → {after:.1f} MB in int8; for random tokens outputs differ by "
        f"{told.difference:.1%}, cosine {told.cosine:.4f}",
        highlight=False,
    )
    if told.scores is not None and task is not None:
        before, after = told.scores
        console.print(f"{task.score} {before:.2f} in float32 → {after:.2f} in int8", highlight=False)


def _score(folder: Path, task: "Task", data_dir: Path | None) -> Callable[[Any], float]:
    """What scores a graph of the model in `folder` on the task's validation data."""
    from hf_lowrank.pipeline import Pipeline

    pipeline = Pipeline.load(str(folder), task, data_dir)  # which says whether it is one for the task

    def score(graph: Any) -> float:
        pipeline.model = graph
        return pipeline.score()["score"]

    return score
