"""hf-lowrank bench: how fast and how large is a model beside another, such as the dense one?"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption


@dataclass(frozen=True)
class BenchOptions:
    """The options of `hf-lowrank bench`, in the order of its help."""

    against: Annotated[
        str | None,
        typer.Option(help="Another model, such as the one it was made from. Default: its own dense form."),
    ] = None
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", "--batch", help="Sequences at once, repeatable. Default: 1, 32."),
    ] = None
    length: Annotated[list[int] | None, typer.Option(help="Tokens in each; may be repeated. Default: 16 and 128.")] = (
        None
    )
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each model that are counted.")] = 20
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: float32 on a CPU, else as stored."),
    ] = None
    compiled: Annotated[bool, typer.Option("--compile", help="Measure both models under torch.compile.")] = False
    plot: Annotated[Path | None, typer.Option(help="Draw latencies and speed-ups into this PNG.")] = None
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Add the latencies to DIR's compression.json and card, if they repeat within 10%."
        ),
    ] = False
    as_json: JsonOption = False


@command("bench")
def bench_command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder with a model, compressed or dense.", metavar="DIR")],
    given: BenchOptions,
) -> None:
    """Measure latency, throughput, memory, load time and size of a compressed model beside its dense form.

    Both are measured in one process, taking turns. The speed-up is set against the ratio of arithmetic: what is
    missing is spent on memory traffic and on starting twice as many operations.

    Example: hf-lowrank bench ./bert-stsb-lowrank --against ./bert-stsb --threads 1 --plot speed.png
    """
    import torch

    from hf_lowrank.folder.saving import add_facts
    from hf_lowrank.folder.style import save_png
    from hf_lowrank.studies.bench import BenchConfig, bench
    from hf_lowrank.studies.plots.bench import bench_figure

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    defaults = BenchConfig()
    shapes = (tuple(given.batch_size or defaults.batches), tuple(given.length or defaults.lengths))
    config = BenchConfig(*shapes, given.rounds, given.dtype, given.compiled)
    _claim_outputs(context, folder, given)
    measured = bench(folder, given.against, config)
    if given.record and (reason := measured.not_stated()):
        print(f"not recorded: {reason}", file=sys.stderr)
    elif given.record:
        add_facts(folder, latency=measured.latency_facts())
    if given.plot is not None:
        save_png(bench_figure(measured.to_dict()), given.plot)
    if given.as_json:
        return print_json(measured.to_dict())
    console.print(measured.cases_table())
    console.print(measured.loading_table())


def _claim_outputs(context: typer.Context, folder: Path, given: BenchOptions) -> None:
    """Lock what is written until the command ends.

    Raises:
        LowRankError: a picture would be drawn over what is read, or another job writes there.
    """
    from hf_lowrank.cli.work import refuse_inputs
    from hf_lowrank.jobs.files import held

    for read in (folder, given.against):
        if given.plot is not None and read is not None:
            refuse_inputs(given.plot, read)
    for written in ([folder] if given.record else []) + ([given.plot] if given.plot is not None else []):
        context.with_resource(held(written))
