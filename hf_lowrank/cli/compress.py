"""hf-lowrank compress: from a fine-tuned model to a folder that from_pretrained loads."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowrank.cli.app import app
from hf_lowrank.cli.budgets import (
    AlignOption,
    AllocationOption,
    CapOption,
    FloorOption,
    FlopsOption,
    KeepModelOption,
    KeepOption,
    KeepScoreOption,
    LatencyOption,
    LossOption,
    ParamsOption,
    RankRatioOption,
    refuse_contradictions,
)
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import (
    BatchOption,
    DataOption,
    ExcludeOption,
    FormOption,
    IncludeOption,
    JsonOption,
    LabelColumnOption,
    LengthOption,
    MethodOption,
    MinutesOption,
    ModelArgument,
    OverwriteOption,
    ResumeOption,
    SamplesOption,
    SeedOption,
    TextColumnOption,
    VerboseOption,
    patterns,
    refuse_taken,
)
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.interrupts import MINUTES
from hf_lowrank.solvers.family import OPTIMIZER_NAMES
from hf_lowrank.tasks.table import NAMES, get_task


@app.command("compress")
def compress_command(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="Where the compressed model goes.")],
    task: Annotated[
        str | None, typer.Option(help=f"The task to measure on, not needed by --method svd: {', '.join(NAMES)}.")
    ] = None,
    method: MethodOption = "kfac",
    rank_ratio: RankRatioOption = None,
    keep: KeepOption = None,
    keep_model: KeepModelOption = None,
    params: ParamsOption = None,
    flops: FlopsOption = None,
    latency: LatencyOption = None,
    keep_score: KeepScoreOption = None,
    max_loss_increase: LossOption = None,
    allocation: AllocationOption = None,
    align: AlignOption = None,
    floor: FloorOption = 0.0,
    cap: CapOption = None,
    optimizer: Annotated[
        str | None, typer.Option(help=f"For methods that iterate: {', '.join(OPTIMIZER_NAMES)}. Default: alternating.")
    ] = None,
    form: FormOption = "factors",
    data_dir: DataOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
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
    push_to_hub: Annotated[str | None, typer.Option(help="Publish it under this name; see 'hf-lowrank push'.")] = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    checkpoint_minutes: MinutesOption = MINUTES,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a fine-tuned model and save it as a folder that from_pretrained loads.

    Example: hf-lowrank compress ./bert-stsb --task stsb --rank-ratio 0.2 --output ./bert-stsb-lowrank

    Budgets: --rank-ratio, --keep, --keep-model, --params, --flops or --latency says how small; --keep-score or
    --max-loss-increase searches for the smallest model that is still good enough.
    """
    started = time.perf_counter()
    budgets: dict[str, Any] = {"rank_ratio": rank_ratio, "keep": keep, "keep_model": keep_model}
    budgets |= {"params": params, "flops": flops, "latency": latency}
    refuse_contradictions(budgets, keep_score, max_loss_increase)
    spread: dict[str, Any] = {"allocation": allocation, "align": align, "floor": floor, "cap": cap}
    chosen: dict[str, Any] = {"include": patterns(include), "exclude": patterns(exclude)}
    config = CompressionConfig(method, optimizer=optimizer, form=form, **chosen, **budgets, **spread)
    measures = score or keep_score is not None or max_loss_increase is not None or allocation == "knapsack"
    if task is None and (config.needs or measures):
        raise LowRankError(f"compress needs a --task to measure on{'' if measures else f' by the method {method}'}")
    columns: dict[str, Any] = {"data_dir": data_dir, "text_columns": text_column, "label_column": label_column}
    the_task: Any = get_task(task, max_length, **columns) if task is not None else None
    refuse_taken(output, overwrite or resume)

    from accelerate import PartialState

    from hf_lowrank.cli.facts import origin, public_name, versions
    from hf_lowrank.cli.smallest import measured_profile, smallest
    from hf_lowrank.cli.work import check_memory, claim, open_work, refuse_output
    from hf_lowrank.compression.compress import check_possible, compress
    from hf_lowrank.folder.earlier import of_original
    from hf_lowrank.folder.hub import push_folder, refuse_without_token
    from hf_lowrank.folder.loading import load_as_saved, load_model, stored_dtype
    from hf_lowrank.folder.saving import add_facts, save_compressed
    from hf_lowrank.folder.scores import with_score
    from hf_lowrank.statistics import Statistics, compute_statistics
    from hf_lowrank.statistics.container import content_digest
    from hf_lowrank.tasks.calibration import calibration_loader
    from hf_lowrank.tasks.labels import label_mapping
    from hf_lowrank.training.evaluate import evaluate_described

    claim(context, output, model, data_dir, statistics)
    replace = refuse_output(output, resume, overwrite)
    if push_to_hub is not None:
        refuse_without_token()  # before the work, not after it
    memory: dict[str, int] | None = None
    tokenizer: Any
    sums_at = None
    if the_task is None:
        loaded, tokenizer = load_as_saved(model)
    else:
        memory, sums_at = check_memory(model, the_task, config.needs, config.include, config.exclude, batch_size)
        loaded, tokenizer = load_model(model, the_task)
    check_possible(loaded, config)
    facts: dict[str, Any] = {"base_model": public_name(model), "versions": versions(), "memory": memory}
    if the_task is not None:
        facts |= {"task": the_task.name, "data": origin(model, the_task, data_dir, seed)["data"]}
        if mapping := label_mapping(the_task, loaded.config):
            facts["labels"] = mapping
    if score:
        metrics, scored_on = evaluate_described(loaded, tokenizer, the_task, data_dir)
        facts |= with_score(facts, "dense", metrics["score"], scored_on)
    measured = loader = None
    if needs := config.needs:
        if statistics is not None:
            measured = Statistics.load(statistics)
        else:
            loader = calibration_loader(loaded, tokenizer, the_task, data_dir, samples, batch_size, seed)
    settings = {**asdict(config), "task": the_task and the_task.name, "batch_size": batch_size}
    settings |= {"keep_score": keep_score, "max_loss_increase": max_loss_increase}
    data = loader if statistics is None else content_digest(statistics)
    work = open_work(output, loaded, data, settings, seed, resume, overwrite, checkpoint_minutes)
    if loader is not None:
        measured = compute_statistics(
            loaded, loader, needs, include=include, exclude=exclude, origin=origin(model, the_task, data_dir, seed),
            device=sums_at, work=work,
        )  # fmt: skip
    profile = measured_profile(loaded, tokenizer, the_task, data_dir, config, measured, seed)
    if keep_score is not None or max_loss_increase is not None:
        found = smallest(
            loaded, tokenizer, the_task, data_dir, config, measured, profile, keep_score, max_loss_increase
        )
        loaded, report = found.model, found.report
        facts["search"] = {"keep_score": keep_score, "max_loss_increase": max_loss_increase, "tried": found.tried}
    else:
        loaded, report = compress(loaded, config, measured, work=work, profile=profile)
    if PartialState().is_main_process:
        work.mark_saving()
        report, facts = of_original(report, facts, loaded.name_or_path)
        save_compressed(loaded, tokenizer, report, output, replace, stored_dtype(model), **facts)
        if score:  # as a user gets it: loaded back
            metrics, scored_on = evaluate_described(*load_model(str(output), the_task), the_task, data_dir)
            found_now = with_score(facts, "compressed", metrics["score"], scored_on)
            facts |= found_now
            add_facts(output, **found_now)
        work.remove()
        if push_to_hub is not None:
            facts["address"] = push_folder(output, push_to_hub)
        if as_json:
            return print_json({**facts, "output": str(output), **report.to_dict()})
        console.print(report if verbose else report.summary(), highlight=False)
        if score:
            before = "given" if "score_given" in facts else "dense"
            console.print(
                f"{the_task.score} {facts[f'score_{before}']:.2f} {before} → {facts['score_compressed']:.2f} compressed"
            )
        if push_to_hub is not None:
            console.print(f"pushed to {push_to_hub}: {facts['address']}", highlight=False)
        console.print(f"saved to {output} after {time.perf_counter() - started:.0f} s", highlight=False)
