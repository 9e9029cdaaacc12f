"""A dense model's score or loss on validation data → what a smaller one must reach to be good enough."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import agreed
from hf_lowrank.tasks import Task
from hf_lowrank.training.evaluate import evaluate_splits, predict_rows


@dataclass(frozen=True)
class Limit:
    """What is measured of a candidate, the worst that is accepted, and whether less is better."""

    name: str
    measure: Callable[[PreTrainedModel], float]
    worst: float
    lower_is_better: bool

    def accepts(self, value: float) -> bool:
        """Whether what was measured is good enough."""
        return value <= self.worst if self.lower_is_better else value >= self.worst

    def __str__(self) -> str:
        return f"{self.name} {self.worst:.4g}"


def score_limit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    validation: Sequence[Dataset],
    keep_score: float,
) -> Limit:
    """The share `keep_score` of the score that `model` has on the encoded splits.

    Raises:
        LowRankError: that score is not above 0, so that it has no shares.
    """

    def score(candidate: PreTrainedModel) -> float:
        return evaluate_splits(candidate, tokenizer, task, validation, progress=False)["score"]

    dense = agreed(score(model))
    if not dense > 0:
        raise LowRankError(f"the dense model scores {dense:.4g}, of which there is no share: use max_loss_increase")
    worst = dense / keep_score if task.lower_is_better else dense * keep_score
    return Limit("score", score, worst, task.lower_is_better)


def loss_limit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    validation: Sequence[Dataset],
    increase: float,
) -> Limit:
    """The mean loss of `model` over the rows of each of the encoded splits, and `increase` more."""

    def loss(candidate: PreTrainedModel) -> float:
        outputs = [predict_rows(candidate, tokenizer, task, rows, progress=False) for rows in validation]
        return sum(sum(found.losses) / len(found.losses) for found in outputs) / len(outputs)

    return Limit("loss", loss, agreed(loss(model)) + increase, lower_is_better=True)
