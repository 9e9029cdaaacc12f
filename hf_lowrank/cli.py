"""The command `hf-lowrank`: each subcommand calls the library's public functions and prints what they return."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import datasets
import transformers
import typer
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from hf_lowrank.allocation import ALLOCATIONS
from hf_lowrank.calibration import calibration_loader
from hf_lowrank.compress import CompressionConfig, compress
from hf_lowrank.demo import results_table, run_demo
from hf_lowrank.errors import LowRankError
from hf_lowrank.evaluate import evaluate
from hf_lowrank.files import refuse_existing
from hf_lowrank.inspection import inspect, ranks_table
from hf_lowrank.loading import load_model, stored_dtype
from hf_lowrank.saving import add_facts, save_compressed
from hf_lowrank.solvers import METHODS, get_method
from hf_lowrank.statistics import KINDS, Statistics, compute_statistics
from hf_lowrank.tasks import TASKS, Task, get_task

app = typer.Typer(
    name="hf-lowrank",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Make Hugging Face transformers smaller by importance-weighted low-rank factorization. Start with "
    "[bold]hf-lowrank demo[/bold], which needs no download.",
)

ModelArgument = Annotated[str, typer.Argument(help="A folder with a model, or its name on the Hub.", metavar="MODEL")]
TaskOption = Annotated[str, typer.Option("--task", help=f"What the model was fine-tuned on: {', '.join(TASKS)}.")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help="A folder with train and validation files (parquet, csv, json, jsonl). Default: the Hub data set."
    ),
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
        help="Factorize only linears of this name pattern, such as 'query' or '*.mlp.*'; may be repeated. [dim]"
        "Default: all linears inside the transformer blocks.[/dim]"
    ),
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(help="Leave linears of this name pattern dense; may be repeated.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]

# Formulas and names hold brackets, so no markup; a file or a pipe is not 80 columns wide.
console = Console(markup=False, width=None if sys.stdout.isatty() else 140)


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="Where the best compressed model goes.")] = Path("hf-lowrank-demo"),
    seed: Annotated[int, typer.Option(help="Of the generated data and the training.")] = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a small BERT on a generated task, compress it by three methods at three ranks, compare. No download."""
    record = run_demo(output, seed, overwrite)
    if as_json:
        return _print_json(record)
    console.print(results_table(record))
    console.print(
        f"the best is saved in {output}, and scores the same after AutoModel loaded it back; "
        f"{record['seconds']:.0f} s in all. Look into it with: hf-lowrank inspect {output}",
        highlight=False,
    )


@app.command("compress")
def compress_command(
    model: ModelArgument,
    task: TaskOption,
    output: Annotated[Path, typer.Option(help="Where the compressed model goes.")],
    method: Annotated[str, typer.Option(help="What is minimised; 'hf-lowrank methods' lists them.")] = "kfac",
    rank_ratio: Annotated[
        float, typer.Option(help="Share of the ranks to keep, rank / min(in, out), in (0, 1].")
    ] = 0.33,
    allocation: Annotated[
        str | None,
        typer.Option(help=f"Spread of ranks over layers at equal size: {', '.join(ALLOCATIONS)}. Default: by method."),
    ] = None,
    data_dir: DataOption = None,
    samples: SamplesOption = 512,
    batch_size: BatchOption = 16,
    max_length: LengthOption = None,
    seed: SeedOption = 0,
    statistics: Annotated[Path | None, typer.Option(help="Use statistics saved by 'hf-lowrank statistics'.")] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    score: Annotated[
        bool, typer.Option("--evaluate", help="Score the model before and after, on the validation data.")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a fine-tuned model and save it as a folder that from_pretrained loads.

    Example: hf-lowrank compress ./bert-stsb --task stsb --rank-ratio 0.2 --output ./bert-stsb-lowrank
    """
    started = time.perf_counter()
    config = CompressionConfig(method, rank_ratio, allocation, _patterns(include), _patterns(exclude))
    the_task = get_task(task, max_length)
    refuse_existing(output, overwrite)
    loaded, tokenizer = load_model(model, the_task)
    facts: dict[str, Any] = {"base_model": _public_name(model), "task": the_task.name, "versions": _versions()}
    if score:
        facts["score_dense"] = evaluate(loaded, tokenizer, the_task, data_dir)["score"]
    measured = None
    if needs := get_method(method).needs:
        if statistics is not None:
            measured = Statistics.load(statistics)
        else:
            loader = calibration_loader(loaded, tokenizer, the_task, data_dir, samples, batch_size, seed)
            origin = _origin(model, the_task, data_dir, seed)
            measured = compute_statistics(loaded, loader, needs, include=include, exclude=exclude, origin=origin)
    loaded, report = compress(loaded, config, measured)
    if PartialState().is_main_process:
        save_compressed(loaded, tokenizer, report, output, overwrite, stored_dtype(model), **facts)
        if score:  # as a user gets it: loaded back
            facts["score_compressed"] = evaluate(*load_model(str(output), the_task), the_task, data_dir)["score"]
            add_facts(output, score_compressed=facts["score_compressed"])
        if as_json:
            return _print_json({**facts, "output": str(output), **report.to_dict()})
        console.print(report)
        if score:
            console.print(
                f"{the_task.score} {facts['score_dense']:.2f} dense → {facts['score_compressed']:.2f} compressed"
            )
        console.print(f"saved to {output} after {time.perf_counter() - started:.0f} s", highlight=False)


@app.command("statistics")
def statistics_command(
    model: ModelArgument,
    task: TaskOption,
    output: Annotated[Path, typer.Option(help="Where the statistics go.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"What to measure; may be repeated: {', '.join(KINDS)}. Default: what kfac needs."),
    ] = None,
    data_dir: DataOption = None,
    samples: SamplesOption = 512,
    batch_size: BatchOption = 16,
    max_length: LengthOption = None,
    seed: SeedOption = 0,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure statistics once, to compress with them many times (compress --statistics)."""
    the_task = get_task(task, max_length)
    refuse_existing(output, overwrite)
    loaded, tokenizer = load_model(model, the_task)
    loader = calibration_loader(loaded, tokenizer, the_task, data_dir, samples, batch_size, seed)
    origin = _origin(model, the_task, data_dir, seed)
    kinds = kind or METHODS["kfac"].needs
    measured = compute_statistics(loaded, loader, kinds, include=include, exclude=exclude, origin=origin)
    if PartialState().is_main_process:
        measured.save(output, overwrite)
        console.print(
            f"{', '.join(measured.kinds)} of {len(measured.weights)} layers over {measured.samples} samples "
            f"saved to {output}"
        )


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    task: TaskOption,
    data_dir: DataOption = None,
    batch_size: BatchOption = 32,
    max_length: LengthOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model, dense or compressed, on a task's whole validation data."""
    the_task = get_task(task, max_length)
    loaded, tokenizer = load_model(model, the_task)
    result = evaluate(loaded, tokenizer, the_task, data_dir, batch_size)
    if not PartialState().is_main_process:
        return
    if as_json:
        return _print_json({"model": model, "task": the_task.name, "parameters": loaded.num_parameters(), **result})
    table = Table(
        "metric", "value", box=None, title=f"{model} on {the_task.name}, {loaded.num_parameters():,} parameters"
    )
    for key, value in result.items():
        if key not in ("score", "degenerate"):
            table.add_row(key, f"{value:.2f} (score)" if key == the_task.score else f"{value:.4g}")
    console.print(table)
    if result.get("degenerate"):
        console.print("warning: every prediction is the same; the model has collapsed")


@app.command("inspect")
def inspect_command(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show what was factorized in a saved model, at which ranks, and what it cost."""
    facts = inspect(model)
    if as_json:
        return _print_json(facts)
    size = f", {facts['bytes'] / 1e6:.1f} MB of weights" if facts["bytes"] else ""
    console.print(f"{facts['architecture']}, {facts['dtype']}{size}")
    share = facts["parameters"] / facts["parameters_dense"]
    console.print(f"{facts['parameters']:,} parameters, {share:.1%} of the dense model's {facts['parameters_dense']:,}")
    if record := facts["record"]:
        console.print(
            f"made from {record['base_model']} for {record['task']} by {record['settings']['method']} "
            f"at rank ratio {record['settings']['rank_ratio']}"
        )
    console.print(ranks_table(facts["layers"]))


@app.command("methods")
def methods_command() -> None:
    """List the methods: what each one minimises, what it needs, where it comes from."""
    table = Table("method", "minimises", "needs", "ranks", "source", box=None, title="Δ = W − up @ down")
    for method in METHODS.values():
        table.add_row(
            method.name, method.formula, ", ".join(method.needs) or "nothing", method.allocation, method.source
        )
    console.print(table)


def main() -> None:
    """Entry point: bad input ends with one line on stderr and exit code 2, Ctrl-C with 130."""
    _quiet_libraries()
    try:
        app()
    except LowRankError as error:
        if os.environ.get("HF_LOWRANK_DEBUG"):
            raise
        print(f"hf-lowrank: {error}", file=sys.stderr)
        sys.exit(2)


def _quiet_libraries() -> None:
    """Their bars and notices would drown ours; errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _patterns(given: list[str] | None) -> tuple[str, ...] | None:
    return tuple(given) if given else None


def _public_name(model: str) -> str:
    """A Hub name as it is, a folder by its last part: paths of this machine do not belong in a record."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _origin(model: str, task: Task, data_dir: Path | None, seed: int) -> dict[str, Any]:
    data = task.hub[0] if data_dir is None else data_dir.resolve().name
    return {"model": _public_name(model), "task": task.name, "data": data, "split": "train", "seed": seed}


def _versions() -> dict[str, str]:
    import torch

    from hf_lowrank import __version__

    return {"hf_lowrank": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, indent=2))
