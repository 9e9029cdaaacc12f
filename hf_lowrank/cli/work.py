"""--resume: where a command keeps its unfinished work, and what must be the same for it to go on."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader

from hf_lowrank.cli.facts import versions
from hf_lowrank.compression.memory import estimate_memory, skeleton, sums_device
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import MINUTES, Work
from hf_lowrank.jobs.distributed import held_for_all, on_main
from hf_lowrank.jobs.files import refuse_existing
from hf_lowrank.model.weights import model_digest
from hf_lowrank.tasks import Task
from hf_lowrank.tasks.calibration import data_digest


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


def check_memory(
    model: str,
    task: Task,
    kinds: Sequence[str],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    batch_size: int,
) -> tuple[dict[str, int] | None, torch.device | None]:
    """The bytes that each process will take, told to the user, and where the statistics are to be kept.

    Raises:
        LowRankError: the job does not fit in memory; or as `find_targets`.
    """
    state = PartialState()
    empty = skeleton(model, task, state.device)
    if empty is None:
        return None, None
    estimate = estimate_memory(empty, kinds, include, exclude, batch_size * task.max_length)
    place = sums_device(estimate, state.device)
    if state.is_main_process:
        kept = ", the statistics in main memory" if place is not None else ""
        print(
            f"memory at the peak: about {estimate}, for each of {state.num_processes} process(es){kept}",
            file=sys.stderr,
        )
    return estimate.to_dict(), place


def open_work(
    output: Path,
    model: nn.Module,
    data: DataLoader | str | None,
    settings: Mapping[str, Any],
    seed: int,
    resume: bool,
    overwrite: bool,
    minutes: float = MINUTES,
) -> Work:
    """The work of a job that is known by the model's weights, its samples, settings, seed and versions.

    `data` are the samples, or a digest of the statistics that stand for them.

    Raises:
        LowRankError: as `Work.open`.
    """
    key = {
        "model": model_digest(model),
        "data": data_digest(data) if isinstance(data, DataLoader) else data,
        "settings": dict(settings),
        "seed": seed,
        "versions": versions(),
    }
    return Work.open(work_folder(output), key, resume, overwrite, minutes)
