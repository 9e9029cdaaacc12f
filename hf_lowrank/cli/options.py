"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.family import print_methods_for_help
from hf_lowrank.jobs.files import refuse_existing
from hf_lowrank.solvers.family import COMPARED, METHODS, get_method
from hf_lowrank.tasks.table import NAMES

ModelArgument = Annotated[str, typer.Argument(help="A folder with a model, or its name on the Hub.", metavar="MODEL")]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method", help="What is minimised; 'help' lists the methods.", callback=print_methods_for_help, is_eager=True
    ),
]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help=f"A method to compare; may be repeated, 'all' for all, 'help' lists them. [dim]Default: "
        f"{', '.join(COMPARED)}.[/dim]",
        callback=print_methods_for_help,
        is_eager=True,
    ),
]
TaskOption = Annotated[str, typer.Option("--task", help=f"The task: {', '.join(NAMES)}.")]
DataOption = Annotated[
    Path | None,
    typer.Option(help="A folder with train and validation files (parquet, csv, json, jsonl, txt). Default: the Hub's."),
]
TextColumnOption = Annotated[
    list[str] | None,
    typer.Option("--text-column", help="Column with the text; twice for pairs. For --task custom, or to rename."),
]
LabelColumnOption = Annotated[
    str | None, typer.Option("--label-column", help="Column with the labels: names, numbers, or fractions to predict.")
]
LengthOption = Annotated[
    int | None, typer.Option(help="Cut texts at this many tokens. Default: the task's own, 128 for GLUE.")
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Training samples that statistics are measured on.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Samples in a batch. Changes speed and memory, not the result.")]
SeedOption = Annotated[int, typer.Option(help="Which training samples are chosen.")]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Factorize only linears, embeddings and convolutions of this name pattern, such as 'query', '*.mlp.*', "
        "'word_embeddings' or '*.convolution'; may be repeated. [dim]"
        "Default: all linears inside the transformer blocks.[/dim]"
    ),
]
FormOption = Annotated[
    str,
    typer.Option(help="How factors are stored: factors, or interpolative with r² fewer numbers at rank r."),
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(help="Leave linears of this name pattern dense; may be repeated.")
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on where a killed or stopped run of the same command was, from OUTPUT.work; begin, if there is none.",
    ),
]
MinutesOption = Annotated[
    float,
    typer.Option(min=0, help="Minutes between two checkpoints of a pass over the data; 0: after every batch."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the table of all layers as well.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]


def refuse_taken(output: Path, overwrite: bool) -> None:
    """`refuse_existing` before anything heavy is imported; under a launcher, the processes look together later.

    Raises:
        LowRankError: see there.
    """
    if "WORLD_SIZE" not in os.environ:
        refuse_existing(output, overwrite)


def chosen_methods(given: list[str] | None) -> tuple[str, ...]:
    """The methods of --method, each once.

    Raises:
        LowRankError: there is none of a name.
    """
    names = [*METHODS] if "all" in (given or ()) else list(dict.fromkeys(given or COMPARED))
    return tuple(get_method(name).name for name in names)


def patterns(given: list[str] | None) -> tuple[str, ...] | None:
    """The name patterns of --include or --exclude, None where there are none."""
    return tuple(given) if given else None
