"""--resume: where a command keeps its unfinished work, and what must be the same for it to go on."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader

from hf_lowrank.cli.facts import versions
from hf_lowrank.compression.memory import estimate_memory, skeleton, sums_device
from hf_lowrank.jobs.checkpoint import MINUTES, Work
from hf_lowrank.jobs.distributed import on_main
from hf_lowrank.jobs.files import refuse_existing, remove_leftovers
from hf_lowrank.model.weights import model_digest
from hf_lowrank.tasks import Task
from hf_lowrank.tasks.calibration import data_digest


def work_folder(output: Path) -> Path:
    """Where the unfinished work for `output` is: beside it."""
    return output.with_name(f"{output.name}.work")


def refuse_output(output: Path, resume: bool, overwrite: bool) -> bool:
    """Whether the output may be replaced: as the user says, or because the work to be resumed had begun to write it.

    Raises:
        LowRankError: on all processes, if it exists and may not.
    """
    overwrite = overwrite or (resume and on_main(lambda: Work(work_folder(output)).saving))
    on_main(lambda: refuse_existing(output, overwrite))
    on_main(lambda: remove_leftovers(output))
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
