"""A model and a task's training rows → how many of them statistics are measured on, where nobody says it.

What the inputs of a layer in two models have in common is a regression on all of them, which takes some tokens for each
(see `docs/concepts/sequential.md`). So the wider a model and the shorter its texts, the more of these.
"""

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import say_once
from hf_lowrank.model.targets import find_targets
from hf_lowrank.tasks.checks import checked_length
from hf_lowrank.tasks.encoding import encode_chosen
from hf_lowrank.tasks.table import SAMPLES, WINDOWS
from hf_lowrank.tasks.task import Task

TOKENS = 25  # for each input of the widest layer
COUNTED_ON = 256  # rows by which the tokens of a row are told
STEP = 16  # the number is a multiple of this, whatever the batches


def enough_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset | IterableDataset,
    seed: int,
) -> int:
    """As many as hold `TOKENS` tokens for each input of the widest layer, and no fewer than `least_samples`.

    It is said on stderr where it is more than that. There may be fewer rows.

    Raises:
        LowRankError: as `encode`.
    """
    inputs, least = _inputs(model, task), least_samples(task)
    if not inputs:
        return least
    wanted = _steps(TOKENS * inputs / _tokens_each(model, tokenizer, task, rows, seed))
    if wanted <= least:
        return least
    there = len(rows) if isinstance(rows, Dataset) and not task.packed else wanted
    what = f"{min(wanted, there):,} {'windows' if task.packed else 'rows'}{', all there are' * (there < wanted)}"
    say_once(f"measuring on {what}: {TOKENS} tokens for each of {inputs:,} inputs of a layer take {wanted:,}")
    return wanted


def enough_in_words(model: PreTrainedModel, task: Task) -> str:
    """What `enough_samples` asks for, for records.

    Args:
        model: whose layers count.
        task: what a sample is.
    """
    least = f"{least_samples(task):,} samples at least"
    inputs = _inputs(model, task)
    return f"{TOKENS} tokens for each of {inputs:,} inputs of a layer, {least}" if inputs else least


def _inputs(model: PreTrainedModel, task: Task) -> int:
    """Those of the widest linear layer inside of the blocks; 0 where there is none, or samples are not of tokens."""
    if task.kind == "image_classification":  # what an image is cut into the model alone knows
        return 0
    try:
        targets = find_targets(model)
    except LowRankError:
        return 0
    return max((target.shape[1] for target in targets.values() if target.kind in ("linear", "expert")), default=0)


def least_samples(task: Task) -> int:
    """`WINDOWS` where every token is predicted, else `SAMPLES`, whatever they are worth in tokens."""
    return WINDOWS if task.kind == "causal_lm" else SAMPLES


def _tokens_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Dataset | IterableDataset,
    seed: int,
) -> float:
    """The mean tokens of a sample; of an encoder-decoder those that the shorter side reads."""
    if task.packed:
        return checked_length(task, tokenizer, model.config)
    encoded = encode_chosen(rows, task, tokenizer, model.config, COUNTED_ON, seed)
    read = ("input_ids", "labels") if task.kind == "seq2seq" else ("input_ids",)
    counted: Any = rows
    return min(sum(map(len, encoded[column])) for column in read) / min(COUNTED_ON, len(counted))


def _steps(number: float) -> int:
    """The next multiple of `STEP`."""
    return int(-(-number // STEP)) * STEP
