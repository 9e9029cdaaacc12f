"""A dense model's score or loss on validation data → what a smaller one must reach to be good enough."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import agreed
from hf_lowrank.tasks import Task
from hf_lowrank.training.evaluate import score_and_loss


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


def limit_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    validation: Sequence[Dataset],
    keep_score: float | None = None,
    max_loss_increase: float | None = None,
) -> Limit:
    """The share `keep_score` of the score that `model` has on the encoded splits, or else its mean loss and more.

    Raises:
        LowRankError: the score is not above 0, so that it has no shares.
    """
    name = "loss" if keep_score is None else "score"

    def measure(candidate: PreTrainedModel) -> float:
        return score_and_loss(candidate, tokenizer, task, validation, progress=False)[name]

    dense = agreed(measure(model))
    if keep_score is None:
        return Limit(name, measure, dense + (max_loss_increase or 0.0), lower_is_better=True)
    if not dense > 0:
        raise LowRankError(f"the dense model scores {dense:.4g}, of which there is no share: use max_loss_increase")
    worst = dense / keep_score if task.lower_is_better else dense * keep_score
    return Limit(name, measure, worst, task.lower_is_better)
