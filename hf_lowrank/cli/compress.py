"""hf-lowrank compress: from a fine-tuned model to a folder that from_pretrained loads."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState

from hf_lowrank.allocation import ALLOCATIONS
from hf_lowrank.calibration import calibration_loader
from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.facts import origin, public_name, versions
from hf_lowrank.cli.options import (
    BatchOption,
    DataOption,
    ExcludeOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OverwriteOption,
    SamplesOption,
    SeedOption,
    TaskOption,
    patterns,
)
from hf_lowrank.compress import CompressionConfig, compress
from hf_lowrank.evaluate import evaluate
from hf_lowrank.files import refuse_existing
from hf_lowrank.loading import load_model, stored_dtype
from hf_lowrank.saving import add_facts, save_compressed
from hf_lowrank.solvers import get_method
from hf_lowrank.statistics import Statistics, compute_statistics
from hf_lowrank.tasks import get_task


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
    config = CompressionConfig(method, rank_ratio, allocation, patterns(include), patterns(exclude))
    the_task = get_task(task, max_length)
    refuse_existing(output, overwrite)
    loaded, tokenizer = load_model(model, the_task)
    facts: dict[str, Any] = {"base_model": public_name(model), "task": the_task.name, "versions": versions()}
    if score:
        facts["score_dense"] = evaluate(loaded, tokenizer, the_task, data_dir)["score"]
    measured = None
    if needs := get_method(method).needs:
        if statistics is not None:
            measured = Statistics.load(statistics)
        else:
            loader = calibration_loader(loaded, tokenizer, the_task, data_dir, samples, batch_size, seed)
            source = origin(model, the_task, data_dir, seed)
            measured = compute_statistics(loaded, loader, needs, include=include, exclude=exclude, origin=source)
    loaded, report = compress(loaded, config, measured)
    if PartialState().is_main_process:
        save_compressed(loaded, tokenizer, report, output, overwrite, stored_dtype(model), **facts)
        if score:  # as a user gets it: loaded back
            facts["score_compressed"] = evaluate(*load_model(str(output), the_task), the_task, data_dir)["score"]
            add_facts(output, score_compressed=facts["score_compressed"])
        if as_json:
            return print_json({**facts, "output": str(output), **report.to_dict()})
        console.print(report)
        if score:
            console.print(
                f"{the_task.score} {facts['score_dense']:.2f} dense → {facts['score_compressed']:.2f} compressed"
            )
        console.print(f"saved to {output} after {time.perf_counter() - started:.0f} s", highlight=False)
