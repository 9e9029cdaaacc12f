"""Options that several commands share, in groups: a command that takes a group has all its options.

To add an option is to add a field to its group here or in `budgets`, or to the group of the one command that has it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowrank.cli.family import print_methods_for_help
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.files import refuse_existing
from hf_lowrank.jobs.interrupts import MINUTES
from hf_lowrank.jobs.settings import check_choice
from hf_lowrank.solvers.family import COMPARED, DEFAULT_GAUGE, METHODS, OPTIMIZER_NAMES, get_method
from hf_lowrank.statistics.names import LABELS
from hf_lowrank.tasks.table import NAMES, SAMPLES, WINDOWS, get_task

if TYPE_CHECKING:
    from hf_lowrank.tasks.task import Task

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
BatchOption = Annotated[int, typer.Option(min=1, help="Samples in a batch. Changes speed and memory, not the result.")]
FormOption = Annotated[
    str,
    typer.Option(help="How factors are stored: factors, or interpolative with r² fewer numbers at rank r."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the table of all layers as well.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]


def checked_labels(given: str | None) -> str | None:
    """The value of --labels.

    Raises:
        LowRankError: there are no such labels.
    """
    if given is not None:
        check_choice("labels", given, LABELS)
    return given


SequentialOption = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential",
        help="Factorize layers in the order of the forward pass, each for what it reads behind those before it: nearer "
        "to the dense model, and about three times the measuring. Default: the method's own, yes for kfac.",
    ),
]


@dataclass(frozen=True)
class FactorOptions:
    """How factors are found and stored: the fields of `CompressionConfig` of these names."""

    optimizer: Annotated[
        str | None, typer.Option(help=f"For methods that iterate: {', '.join(OPTIMIZER_NAMES)}. Default: alternating.")
    ] = None
    form: FormOption = "factors"
    gauge: Annotated[
        str,
        typer.Option(help="The basis between the two factors: flat, which loses least by int8 and int4, or balanced."),
    ] = DEFAULT_GAUGE
    sequential: SequentialOption = None


@dataclass(frozen=True)
class DataOptions:
    """Which rows a task has, and how they are read."""

    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="A folder with train and validation files (parquet, csv, json, jsonl, txt). Default: the Hub's."
        ),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(help="In place of a folder a data set on the Hub, NAME or NAME:CONFIG, for tasks of own data."),
    ] = None
    config: Annotated[str | None, typer.Option(help="Which one of the configs of --dataset, if it has several.")] = None
    split: Annotated[
        str | None, typer.Option(help="Which one of the splits of --dataset is measured on. Default: train.")
    ] = None
    text_column: Annotated[
        list[str] | None,
        typer.Option(
            "--text-column", help="Column with the text; twice for pairs. For --texts, --task custom, or to rename."
        ),
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option("--label-column", help="Column with the labels: names, numbers, or fractions to predict."),
    ] = None
    max_length: Annotated[
        int | None, typer.Option(help="Cut texts at this many tokens. Default: the task's own, 128 for GLUE.")
    ] = None

    @property
    def named_dataset(self) -> str | None:
        """The data set with its config.

        Raises:
            LowRankError: a config of none.
        """
        if self.config is not None and self.dataset is None:
            raise LowRankError("--config is one of a --dataset, and none is given")
        return self.dataset if self.config is None else f"{self.dataset}:{self.config}"

    def of_task(self, name: str) -> "Task":
        """The task of that name with these data.

        Raises:
            LowRankError: as `get_task`.
        """
        columns: dict[str, Any] = {"text_columns": self.text_column, "label_column": self.label_column}
        columns |= {"dataset": self.named_dataset, "split": self.split}
        return get_task(name, self.max_length, data_dir=self.data_dir, **columns)


@dataclass(frozen=True)
class DataOrTexts(DataOptions):
    """As `DataOptions`, or texts without labels in place of a task."""

    texts: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a task, texts without labels: a .txt file with one a line, or a column of a jsonl, csv or "
            "parquet file."
        ),
    ] = None

    def reading(self, task: str | None) -> "Task | None":
        """The task of that name; None where there is none, or texts in its place.

        Raises:
            LowRankError: both were given; or as `get_task`.
        """
        if self.texts is not None and not (task is self.data_dir is self.dataset is None):
            raise LowRankError("give --task (and --data-dir) or --texts, not both")
        return None if task is None else self.of_task(task)

    def of_texts(self, model: str) -> "Task | None":
        """The task of reading the texts, if there are any, with the model called `model`.

        Raises:
            LowRankError: as `read_texts` and `texts_task`.
        """
        if self.texts is None:
            return None
        from hf_lowrank.pipeline import task_of_texts
        from hf_lowrank.tasks.texts import read_texts

        return task_of_texts(model, read_texts(self.texts, self.text_column or ()), self.max_length)


@dataclass(frozen=True)
class CalibrationOptions:
    """What statistics are measured on: the fields of `Pipeline` of these names."""

    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Training samples that statistics are measured on. Default: as many as give each input of the widest "
            f"layer 25 tokens, and {SAMPLES:,} at least, of a language model {WINDOWS}.",
        ),
    ] = None
    batch_size: BatchOption = 16
    seed: Annotated[int, typer.Option(help="Which training samples are chosen.")] = 0


@dataclass(frozen=True)
class StatisticsCalibration(CalibrationOptions):
    """As `CalibrationOptions`, and whose labels statistics are by."""

    labels: Annotated[
        str | None,
        typer.Option(
            help="Whose labels statistics are by: 'data', or 'model' for all that the model itself expects, "
            "for which the data need none. Default: the method's own.",
            callback=checked_labels,
        ),
    ] = None


@dataclass(frozen=True)
class LayerOptions:
    """Which layers."""

    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Factorize only linears, embeddings and convolutions of this name pattern, such as 'query', "
            "'*.mlp.*', 'word_embeddings' or '*.convolution'; may be repeated. [dim]"
            "Default: all linears inside the transformer blocks.[/dim]"
        ),
    ] = None
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave linears of this name pattern dense; may be repeated.")
    ] = None

    @property
    def patterns(self) -> dict[str, Any]:
        """The arguments `include` and `exclude` of the library, None where there are no patterns."""
        return {name: tuple(given) if given else None for name, given in vars(self).items()}


@dataclass(frozen=True)
class JobOptions:
    """What becomes of an output that is there, and of unfinished work."""

    overwrite: OverwriteOption = False
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where a killed or stopped run of the same command was, from OUTPUT.work; begin, if there is "
            "none.",
        ),
    ] = False
    checkpoint_minutes: Annotated[
        float,
        typer.Option(min=0, help="Minutes between two checkpoints of a pass over the data; 0: after every batch."),
    ] = MINUTES


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
