"""hf-lowrank quantize: a model's weights in 8 or 4 bits."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console
from hf_lowrank.cli.options import DataOptions, OverwriteOption, refuse_taken
from hf_lowrank.folder.quantizers import DTYPES, QUANTIZERS, SCHEMES, Quantization
from hf_lowrank.tasks.table import NAMES

if TYPE_CHECKING:
    from hf_lowrank.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """The options of `hf-lowrank quantize`, in the order of its help."""

    data: DataOptions
    bits: Annotated[int, typer.Option(help="Of a weight: 8 or 4.")] = 8
    library: Annotated[str, typer.Option(help=f"Which library quantizes, and loads it: {', '.join(QUANTIZERS)}.")] = (
        "compressed-tensors"
    )
    scheme: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {meaning}" for name, meaning in SCHEMES.items()) + ".")
    ] = "weight-only"
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            help="Of embeddings: 8, 4, or 0 to leave them, as vLLM and SGLang read no others. "
            "[dim]Default: 8 by compressed-tensors, which alone can.[/dim]"
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Of what is not quantized, scales among it: {', '.join(DTYPES)}. Default: as stored."),
    ] = None
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Round with what 'hf-lowrank statistics' saved of the model, or of the dense one that it was made "
            "of. [dim]Default: every weight to the nearest.[/dim]"
        ),
    ] = None
    task: Annotated[
        str | None, typer.Option(help=f"Score it before and after on the validation data: {', '.join(NAMES)}.")
    ] = None
    overwrite: OverwriteOption = False

    def quantization(self) -> Quantization:
        """What is to be done.

        Raises:
            LowRankError: as `Quantization` and its `check_here`.
        """
        chosen = Quantization(self.bits, self.library, self.scheme, self.embedding_bits, self.dtype)
        chosen.check_here()
        return chosen


@command("quantize")
def quantize_command(
    folder: Annotated[Path, typer.Argument(help="A folder with a model, compressed or dense.", metavar="DIR")],
    output: Annotated[Path, typer.Argument(help="Where the quantized model goes.", metavar="OUT")],
    given: QuantizeOptions,
) -> None:
    """Store a model's weights in 8 or 4 bits, by a library that transformers loads it with.

    Factors are quantized as dense layers are, so that both savings multiply. Needs the packages of the extra
    "quantizers": pip install "hf_lowrank\\[quantizers]"

    Example: hf-lowrank quantize ./bert-stsb-lowrank ./bert-stsb-int8 --task stsb
    """
    quantization = given.quantization()
    task = None if given.task is None else given.data.of_task(given.task)
    refuse_taken(output, given.overwrite)

    from hf_lowrank.cli.work import refuse_inputs
    from hf_lowrank.folder.quantize import quantize_folder
    from hf_lowrank.statistics import Statistics

    refuse_inputs(output, folder, given.statistics)
    statistics = None if given.statistics is None else Statistics.load(given.statistics)
    told = quantize_folder(folder, output, quantization, given.overwrite, statistics)
    console.print(
        f"saved to {output}: {told.layers} layers of {given.bits} bits, {told.bytes_before / 1e6:.1f} MB → "
        f"{told.bytes_after / 1e6:.1f} MB",
        highlight=False,
    )
    if task is not None:
        before, after = _scores(folder, output, task, given.data.data_dir)
        console.print(f"{task.score} {before:.2f} before → {after:.2f} quantized", highlight=False)


def _scores(before: Path, after: Path, task: "Task", data_dir: Path | None) -> tuple[float, float]:
    """Of both models; that of the quantized one is noted in its record and card, where it has them."""
    from hf_lowrank.folder.loading import load_model
    from hf_lowrank.folder.saving import add_facts, read_record
    from hf_lowrank.folder.scores import with_score
    from hf_lowrank.training.evaluate import evaluate_described

    first, _ = evaluate_described(*load_model(str(before), task), task, data_dir)
    second, scored_on = evaluate_described(*load_model(str(after), task), task, data_dir)
    if (record := read_record(after)) is not None:
        add_facts(after, **with_score(record, "quantized", second["score"], scored_on))
    return first["score"], second["score"]
