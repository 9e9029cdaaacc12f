"""A model's validation rows, read once → its score and loss with any weights, against those of the dense model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError
from hf_lowrank.statistics.losses import curvature_per_fisher
from hf_lowrank.tasks import Task
from hf_lowrank.training.evaluate import Predictions, predict_rows, score_predictions

JACKKNIFE_GROUPS = 20


@dataclass(frozen=True)
class Baseline:
    """The dense model on the rows that are used: its score with the standard error, and its mean loss per sample."""

    score: float
    score_error: float
    loss: float
    samples: int


@dataclass(frozen=True)
class Measurement:
    """A changed model against the dense one, on the same rows, so that errors are those of the difference.

    `damage` is the score lost, in points; for perplexity the increase of its logarithm, in nats. `loss_increase` is in
    units of the task's loss per sample. Standard errors are over validation samples.
    """

    score: float
    damage: float
    damage_error: float
    loss_increase: float
    loss_increase_error: float


class Evaluator:
    """Measures the model it was made for, whatever weights that has at the time. The first time it must be dense.

    Args:
        validation: encoded splits (`load_validation`); a task with several scores their mean.
        limit: use so many rows in all, chosen by `seed`; None for every row.

    Raises:
        LowRankError: fewer than two rows are left in a split.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        validation: Sequence[Dataset],
        limit: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.task, self.batch_size = model, tokenizer, task, batch_size
        share = None if limit is None else limit // len(validation)
        self.splits = [_chosen(rows, share, seed) for rows in validation]
        if any(len(rows) < 2 for rows in self.splits):
            raise LowRankError(
                f"{task.name} needs two validation samples at least to be analysed; raise --eval-samples"
            )
        dense = self._predict()
        self._penalty, self._penalties, self._losses = self._penalty_of(dense), self._jackknife(dense), _losses(dense)
        score_error = _jackknife_error(self._penalties) * (self._score(dense) if task.lower_is_better else 1.0)
        samples = sum(map(len, self.splits))
        self.curvature = curvature_of(task, dense, float(self._losses.mean()), self.splits)
        self.dense = Baseline(self._score(dense), score_error, float(self._losses.mean()), samples)

    def measure(self) -> Measurement:
        """Run the model over the rows."""
        outputs = self._predict()
        increase = _losses(outputs) - self._losses
        return Measurement(
            self._score(outputs),
            self._penalty_of(outputs) - self._penalty,
            _jackknife_error(self._jackknife(outputs) - self._penalties),
            float(increase.mean()),
            float(increase.std(ddof=1) / len(increase) ** 0.5),
        )

    def _predict(self) -> list[Predictions]:
        return [
            predict_rows(self.model, self.tokenizer, self.task, rows, self.batch_size, progress=False)
            for rows in self.splits
        ]

    def _score(self, outputs: Sequence[Predictions]) -> float:
        return float(np.mean([score_predictions(split, self.task, self.model.config)["score"] for split in outputs]))

    def _penalty_of(self, outputs: Sequence[Predictions]) -> float:
        """The score, turned so that more is worse; the logarithm of a perplexity."""
        results = [score_predictions(split, self.task, self.model.config) for split in outputs]
        return float(np.mean([r["loss"] if self.task.lower_is_better else -r["score"] for r in results]))

    def _jackknife(self, outputs: Sequence[Predictions]) -> np.ndarray:
        """The penalty without each of `JACKKNIFE_GROUPS` shares of the rows in turn."""
        groups = min(JACKKNIFE_GROUPS, *(len(split.losses) for split in outputs))
        return np.array([self._penalty_of([_without(split, k, groups) for split in outputs]) for k in range(groups)])


def curvature_of(task: Task, dense: Sequence[Predictions], loss: float, splits: Sequence[Dataset] = ()) -> float:
    """`curvature_per_fisher` of a task, by the dense model's predictions and mean loss on encoded splits."""
    if task.kind == "seq2seq":
        return float(np.mean([len(labels) for rows in splits for labels in rows["labels"]]))
    several = task.kind in ("causal_lm", "token_classification", "masked_lm")
    each = {"question_answering": 2.0, "multi_label": float(len(task.label_names))}  # two marks, a yes or no for each
    labels = float(np.mean([len(row) for split in dense for row in split.predicted])) if several else 0.0
    return curvature_per_fisher(task.kind == "regression", loss, labels or each.get(task.kind, 1.0))


def _chosen(rows: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or count >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False)))


def _losses(outputs: Sequence[Predictions]) -> np.ndarray:
    return np.concatenate([split.losses for split in outputs])


def _without(outputs: Predictions, group: int, groups: int) -> Predictions:
    return outputs.take(row for row in range(len(outputs.losses)) if row % groups != group)


def _jackknife_error(left_out: np.ndarray) -> float:
    """The standard error of a statistic from its values without each group in turn (Quenouille; Shao & Tu 1995)."""
    return float(np.sqrt((len(left_out) - 1) * np.mean((left_out - left_out.mean()) ** 2)))
