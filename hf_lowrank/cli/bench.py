"""hf-lowrank bench: how fast and how large is a model beside another, such as the dense one?"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption


@app.command("bench")
def bench_command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder with a model, compressed or dense.", metavar="DIR")],
    against: Annotated[
        str | None,
        typer.Option(help="Another model, such as the one it was made from. Default: its own dense form."),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", "--batch", help="Sequences at once, repeatable. Default: 1, 32."),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens in each; may be repeated. Default: 16 and 128.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each model that are counted.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: float32 on a CPU, else as stored."),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure both models under torch.compile.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw latencies and speed-ups into this PNG.")] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Add the latencies to DIR's compression.json and card, if they repeat within 10%."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure latency, throughput, memory, load time and size of a compressed model beside its dense form.

    Both are measured in one process, taking turns. The speed-up is set against the ratio of arithmetic: what is
    missing is spent on memory traffic and on starting twice as many operations.

    Example: hf-lowrank bench ./bert-stsb-lowrank --against ./bert-stsb --threads 1 --plot speed.png
    """
    import torch

    from hf_lowrank.cli.work import refuse_inputs
    from hf_lowrank.folder.saving import add_facts
    from hf_lowrank.folder.style import save_png
    from hf_lowrank.jobs.files import held
    from hf_lowrank.studies.bench import BenchConfig, bench
    from hf_lowrank.studies.plots.bench import bench_figure

    if threads is not None:
        torch.set_num_threads(threads)
    defaults = BenchConfig()
    shapes = (tuple(batch_size or defaults.batches), tuple(length or defaults.lengths))
    config = BenchConfig(*shapes, rounds, dtype, compiled)
    for read in (folder, against):
        if plot is not None and read is not None:
            refuse_inputs(plot, read)
    for written in ([folder] if record else []) + ([plot] if plot is not None else []):
        context.with_resource(held(written))
    measured = bench(folder, against, config)
    if record:
        if reason := measured.not_stated():
            print(f"not recorded: {reason}", file=sys.stderr)
        else:
            add_facts(folder, latency=measured.latency_facts())
    if plot is not None:
        save_png(bench_figure(measured.to_dict()), plot)
    if as_json:
        return print_json(measured.to_dict())
    console.print(measured.cases_table())
    console.print(measured.loading_table())
