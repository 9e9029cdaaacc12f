"""A batch as a model takes it → its samples, each a batch of its own."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_lowrank.errors import LowRankError

Batch = dict[str, Any]
Split = Callable[[Batch], Iterable[Batch]]


@dataclass(frozen=True)
class Marked:
    """Samples that are run at once, and which of their tokens are active for a layer [batch, tokens]."""

    batch: Batch
    active: Mapping[str, Tensor]


class Marks(list[Marked]):
    """This process's samples in the parts that they were run in.

    `complete` if that is all, of all processes; `chained` if the model's blocks were run one at a time.
    """

    complete = chained = False


def batch_size(batch: Batch) -> int:
    """The number of samples: the length of the labels, a tensor or a list, or of the first tensor.

    Raises:
        LowRankError: there are neither labels nor tensors.
    """
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0]
    labels = batch.get("labels")
    if isinstance(labels, (list, tuple)) or (isinstance(labels, Tensor) and labels.ndim > 0):
        return len(labels)
    if tensors:
        return len(tensors[0])
    raise LowRankError(f"a batch of {', '.join(batch) or 'nothing'} holds no tensor whose length is its samples'")


def selected(batch: Batch, samples: Sequence[int]) -> Batch:
    """Some samples of a batch, by their numbers in it: of every tensor, list and tuple these entries.

    What has no length, and tensors of one entry for all samples, stay as they are.

    Raises:
        LowRankError: something has another length than the batch.
    """
    size = batch_size(batch)
    if list(samples) == list(range(size)):
        return batch
    return {name: _entries(name, value, samples, size) for name, value in batch.items()}


def one_by_one(batch: Batch) -> Iterator[Batch]:
    """The samples of a batch, as batches of one."""
    return (selected(batch, [n]) for n in range(batch_size(batch)))


def _entries(name: str, value: Any, samples: Sequence[int], size: int) -> Any:
    if isinstance(value, dict):
        return {key: _entries(f"{name}[{key!r}]", part, samples, size) for key, part in value.items()}
    if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and value.ndim == 0):
        return value
    if len(value) == size:
        return value[list(samples)] if isinstance(value, Tensor) else [value[n] for n in samples]
    if isinstance(value, Tensor) and len(value) == 1:
        return value
    raise LowRankError(
        f"{name} has {len(value)} entries in a batch of {size} samples, so it cannot be split into samples; give "
        "batches of a single sample, or `split`, a function of a batch that gives one batch for each sample"
    )
