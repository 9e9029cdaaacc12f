"""What every training here shares: the order of rows, a progress bar, arguments of Trainer, and checkpoints."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.claims import differences
from hf_lowrank.jobs.files import read_json, write_json
from hf_lowrank.jobs.progress import bar

SETTINGS = "finetuning.json"  # beside the checkpoints: what they belong to


class ByLength(Sampler):
    """A new order in every epoch, by the seed and the epoch alone, so that a resumed epoch goes on in its own order."""

    def __init__(self, trainer: Trainer, lengths: list[int]) -> None:
        self.trainer, self.lengths = trainer, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.grouped(self.seed))

    @property
    def batch(self) -> int:
        """Rows of a step, over all processes."""
        arguments = self.trainer.args
        return arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps

    @property
    def seed(self) -> int:
        """That of the epoch."""
        epoch = int(self.trainer.state.epoch or 0)
        return int(np.random.SeedSequence([self.trainer.args.seed, epoch]).generate_state(1)[0])

    def grouped(self, seed: int) -> list[int]:
        """Rows of like lengths beside each other."""
        return get_length_grouped_indices(self.lengths, self.batch, generator=torch.Generator().manual_seed(seed))


class SameBatches(ByLength):
    """The same batches in every epoch, in another order: what was kept of a batch is found again.

    Rows are sorted by length, those of like lengths in an order by the seed, so that next to nothing is padded.
    """

    def __iter__(self) -> Iterator[int]:
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.trainer.args.seed)).tolist()
        rows.sort(key=self.lengths.__getitem__)
        whole, rest = divmod(len(rows), self.batch)
        order = torch.randperm(whole, generator=torch.Generator().manual_seed(self.seed)).tolist()
        batches = [rows[number * self.batch : (number + 1) * self.batch] for number in order]
        return chain(*batches, rows[len(rows) - rest :])


class Bar(TrainerCallback):
    """Our progress bar, on stderr, instead of the Trainer's own."""

    def __init__(self, title: str, progress: bool) -> None:
        self.title, self.progress = title, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown = bar(self.title, state.max_steps, "steps", self.progress)
        self.shown.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.close()


class Watch(Bar):
    """The bar, and the end of a run that diverges."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """End a training that cannot come to anything.

        Raises:
            LowRankError: its loss is not finite.
        """
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise LowRankError(
                f"the training diverged: its loss is {logs['loss']} after {state.global_step} steps; "
                "lower the learning rate"
            )


def trainer_arguments(
    folder: Path, batch_size: int, learning_rate: float, seed: int, bf16: bool, accumulate: int = 1, **options: Any
) -> TrainingArguments:
    """Trainer's arguments for steps of `batch_size` rows over all processes, in `accumulate` parts one after the other.

    AdamW without weight decay, gradients clipped at norm 1; `options` are others of Trainer's.

    Raises:
        LowRankError: the rows of a step cannot be shared equally.
    """
    state = PartialState()
    if batch_size % (state.num_processes * accumulate):
        parts = f", {accumulate} parts each" if accumulate > 1 else ""
        raise LowRankError(f"a batch of {batch_size} rows cannot be shared by {state.num_processes} processes{parts}")
    arguments = TrainingArguments(
        str(folder),
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size // state.num_processes // accumulate,
        gradient_accumulation_steps=accumulate,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        bf16=bf16,
        use_cpu=state.device.type == "cpu",
        average_tokens_across_devices=False,  # processes have equal shares of every batch
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,  # collators choose what the model reads
        dataloader_pin_memory=state.device.type != "cpu",
        **options,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are several processes, never DataParallel
    return arguments


@contextmanager
def checkpoint_folder(checkpoints: Path | None) -> Iterator[Path]:
    """The folder of the checkpoints, or a temporary one."""
    if checkpoints is not None:
        yield checkpoints
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


@contextmanager
def as_before(model: PreTrainedModel) -> Iterator[None]:
    """Take mixed precision off the model's forward again, which Accelerate leaves on it."""
    names = ("forward", "_original_forward")
    own = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)


def last_checkpoint(folder: Path, settings: dict[str, Any], resume: bool) -> str | None:
    """The last whole checkpoint of an interrupted run with these settings, which are noted for the next one.

    Raises:
        LowRankError: there are checkpoints but `resume` is off, or they belong to a run with other settings.
    """
    path = folder / SETTINGS
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    if whole and path.is_file():
        if not resume:
            raise LowRankError(f"{folder} holds the checkpoints of an interrupted run; resume it, or delete the folder")
        for name, before, now in differences(read_json(path), settings):
            raise LowRankError(
                f"{folder} holds checkpoints of a run with {name} {before!r}, not {now!r}; "
                "resume it with its own settings, or delete the folder"
            )
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_json(path: Path) -> bool:
    """Whether a checkpoint was finished: this file is written last."""
    try:
        read_json(path)
    except LowRankError:
        return False
    return True
