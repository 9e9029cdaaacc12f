"""--resume: where a command keeps its unfinished work, and what must be the same for it to go on."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import typer
from accelerate import PartialState

from hf_lowrank.cli.options import LayerOptions
from hf_lowrank.compression.blockwise import NOTHING_MEASURED, PLANS, Plan, plan_memory
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.memory import MemoryEstimate, estimate_memory, skeleton, statistics_device
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import KEY, Work
from hf_lowrank.jobs.distributed import from_everyone, held_for_all, on_main, shared_errors
from hf_lowrank.jobs.files import read_json, refuse_existing
from hf_lowrank.jobs.settings import check_choice
from hf_lowrank.tasks import Task


def work_folder(output: Path) -> Path:
    """Where the unfinished work for `output` is: beside it."""
    return output.with_name(f"{output.name}.work")


def claim(context: typer.Context, output: Path, model: str | Path, *others: str | Path | None) -> None:
    """Lock an output until the command ends, and put in order what a killed one left of it.

    Args:
        model: what the command reads; neither may lie within the other.
        others: folders that it reads besides, which the output may not be, or hold.

    Raises:
        LowRankError: on all processes, if the output is, holds, or lies in what is read, cannot be written, or is
            another job's at the moment.
    """
    refuse_inputs(output, model, *others)
    context.with_resource(held_for_all(output))


def refuse_inputs(output: Path, model: str | Path, *others: str | Path | None) -> None:
    """Raise where writing `output` would touch what is read.

    Raises:
        LowRankError: it names both.
    """
    place = output.resolve()
    for read in (model, *others):
        path = Path(read).resolve() if read is not None and Path(read).exists() else None
        if path is None:
            continue
        if path.is_relative_to(place) or (read is model and path.is_dir() and place.is_relative_to(path)):
            where = "is" if path == place else "holds" if path.is_relative_to(place) else "lies in"
            raise LowRankError(f"{output} {where} {read}, which this command reads; choose another output")


def refuse_output(output: Path, resume: bool, overwrite: bool, work: Path | None = None) -> bool:
    """Whether the output may be replaced: as the user says, or because the work to be resumed had begun to write it.

    Raises:
        LowRankError: on all processes, if it exists and may not, or has no name.
    """
    if output.name in ("", ".."):
        raise LowRankError(f"{output} has no name of its own, and cannot be replaced; choose a folder within it")
    overwrite = overwrite or (resume and on_main(lambda: Work(work or work_folder(output)).saving))
    on_main(lambda: refuse_existing(output, overwrite))
    return overwrite


def planned_memory(
    model: str, task: Task | None, config: CompressionConfig, asked: str, batch_size: int, also: str
) -> Plan | None:
    """How the job goes about its memory (see `plan_memory`), told to the user; None where that cannot be known.

    Raises:
        LowRankError: as `plan_memory`.
    """
    state = PartialState()
    check_choice("blockwise", asked, PLANS)
    empty = skeleton(model, task, state.device) if task is not None else None
    if task is None or empty is None:
        if asked == "on":
            _tell_whole(NOTHING_MEASURED if task is None else "it cannot be built without its weights")
        return None
    tokens = task.at_once(batch_size, task.max_length) * task.max_length
    plan = _agreed_plan(lambda asked: plan_memory(empty, config, asked, state.device, tokens, also), asked)
    if plan.why_whole:
        _tell_whole(plan.why_whole)
    if state.is_main_process:
        _tell(plan.estimate, plan.place, plan.by_blocks)
    return plan


def _agreed_plan(planned: Callable[[str], Plan], asked: str) -> Plan:
    """The plan of this process, which goes by blocks if any has to: memory is not the same everywhere."""
    with shared_errors():
        plan = planned(asked)
    return planned("on") if any(from_everyone(plan.by_blocks)) else plan


def _tell_whole(why: str) -> None:
    if PartialState().is_main_process:
        print(f"the whole model is held in memory, not block by block, as {why}", file=sys.stderr)


def begun_by_blocks(folder: Path) -> bool | None:
    """Whether the unfinished work in a folder goes block by block, on all processes; None if there is none."""
    path = folder / KEY
    return on_main(lambda: bool(read_json(path).get("settings", {}).get("blockwise")) if path.is_file() else None)


def _tell(estimate: MemoryEstimate, place: torch.device | None, by_blocks: bool = False) -> None:
    processes = PartialState().num_processes
    parts = f", for each of {processes} processes" if processes > 1 else ""
    kept = ", the statistics in main memory" if place is not None else ""
    how = ", block by block" if by_blocks else ""
    print(f"memory at the peak: about {estimate}{parts}{kept}{how}", file=sys.stderr)


def check_memory(
    model: str, task: Task | None, kinds: Sequence[str], layers: LayerOptions, batch_size: int
) -> tuple[dict[str, int] | None, torch.device | None]:
    """The bytes that each process will take, told to the user, and where the statistics are to be kept.

    Raises:
        LowRankError: the job does not fit in memory; or as `find_targets`.
    """
    state = PartialState()
    empty = skeleton(model, task, state.device) if task is not None else None
    if task is None or empty is None:
        return None, None
    tokens = task.at_once(batch_size, task.max_length) * task.max_length
    estimate = estimate_memory(empty, kinds, **layers.patterns, tokens=tokens)
    place = statistics_device(estimate, state.device)
    if state.is_main_process:
        _tell(estimate, place)
    return estimate.to_dict(), place
