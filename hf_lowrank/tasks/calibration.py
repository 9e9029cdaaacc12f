"""The samples that statistics are measured on: a seeded choice of a task's training rows, in batches."""

import hashlib
from itertools import zip_longest
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import from_everyone
from hf_lowrank.jobs.settings import check_seed
from hf_lowrank.tasks import Task, collator
from hf_lowrank.tasks.data import training_rows
from hf_lowrank.tasks.encoding import encode_chosen
from hf_lowrank.tasks.enough import enough_samples
from hf_lowrank.tasks.windows import rows_at_once


def calibration_loader(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data_dir: Path | None = None,
    samples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    labels: str = "data",
) -> DataLoader:
    """Batches of `samples` rows (all, if there are fewer) of the training split, chosen by `seed`.

    None takes as many as `enough_samples` says.

    Of running text a sample is a window of it (see `tasks.windows`), and batches have fewer of them. Under several
    processes each gets its own share. Longest first: batches need little padding, memory is highest at once, and the
    time left is never underestimated. With `labels` "model" none of the data are read, nor need there be.

    Raises:
        LowRankError: the data cannot be read or lack what the task needs.
    """
    check_seed(seed)
    if (samples is not None and samples < 1) or batch_size < 1:
        raise LowRankError(f"samples and batch_size must be at least 1; they are {samples} and {batch_size}")
    task = task.without_labels() if labels == "model" else task
    rows = training_rows(task, data_dir)
    count = enough_samples(model, tokenizer, task, rows, seed) if samples is None else samples
    chosen = encode_chosen(rows, task, tokenizer, model.config, count, seed)
    longest_first = chosen.select(range(len(chosen) - 1, -1, -1))
    state = PartialState()  # no row twice, none left out, long and short ones for everyone
    share = longest_first.shard(state.num_processes, state.process_index, contiguous=False)
    batch_size = rows_at_once(chosen, task, batch_size)
    return DataLoader(share, batch_size=batch_size, collate_fn=collator(task, tokenizer))


def data_digest(loader: DataLoader) -> str:
    """A digest of the encoded rows of a `calibration_loader` in their order, the same for any number of processes."""
    rows: Any = loader.dataset
    shares = from_everyone([hashlib.blake2b(repr(sorted(row.items())).encode()).digest() for row in rows])
    ordered = (row for rank in zip_longest(*shares) for row in rank if row is not None)
    return hashlib.blake2b(b"".join(ordered), digest_size=16).hexdigest()
