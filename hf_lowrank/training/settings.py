"""How to fine-tune, checked without tensors."""

import math
from dataclasses import dataclass

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.settings import check_choice, check_settings


@dataclass(frozen=True)
class FinetuneConfig:
    """How to train. The defaults are the papers': Adam, learning rate 2e-5 with linear decay to 0, batch 32, 3 epochs.

    Adam is AdamW without weight decay; gradients are clipped at norm 1; batches group rows of similar length.

    Args:
        epochs: passes over the training rows; a fraction is allowed.
        batch_size: rows of one step, over all processes.
        seed: of the order of the rows and of dropout. The same seed on the same machine gives the same weights.
        schedule: "linear" decay to 0, or "constant".
        bf16: compute in bfloat16 where that is safe (autocast); weights and optimizer stay float32.
        patience: stop after so many epochs without a better validation score, and keep the best epoch; None trains on.
        evaluate_epochs: score the validation data after every epoch, for the record.

    Raises:
        LowRankError: a number is out of range, or the schedule is unknown.
    """

    epochs: float = 3
    learning_rate: float = 2e-5
    batch_size: int = 32
    seed: int = 0
    schedule: str = "linear"
    bf16: bool = False
    patience: int | None = None
    evaluate_epochs: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        positive = 0 < self.epochs < math.inf and 0 < self.learning_rate < math.inf
        if not (positive and self.batch_size >= 1):
            raise LowRankError(
                "epochs and learning rate must be above 0 and a batch at least 1 row; "
                f"they are {self.epochs}, {self.learning_rate} and {self.batch_size}"
            )
        check_choice("schedule", self.schedule, ("linear", "constant"))
        if self.patience is not None and self.patience < 1:
            raise LowRankError(
                f"the patience of early stopping is a number of epochs, at least 1; it is {self.patience}"
            )


@dataclass(frozen=True)
class HealConfig:
    """How to heal: Adam on the factors alone, over texts without labels, with cosine decay to 0 after a warm-up.

    Args:
        samples: training rows to learn from; None for a quarter of all, but at least 2,048 and at most 4,096, and of
            windows of running text for as many as hold 2,048 × 128 tokens.
        epochs: passes over them, in the same batches; a fraction is allowed.
        held_out: other training rows, on which the divergence from the teacher is measured; of windows of more than
            128 tokens fewer, which hold as many tokens as so many texts of 128.
        rates: learning rates that are tried, the smallest first and each from the start, in short trainings until one
            learns less than that before; the one of least loss goes on, from what it learnt.
        batch_size: rows of one step, over all processes; of windows fewer likewise.
        accumulate: parts of a step that are computed one after the other, where memory is short.
        hidden: weight of the errors of the blocks' hidden states, beside the outputs' divergence, in the beginning; it
            falls to 0 in equal steps.
        patience: stop after so many measurements in a row that were no better than the best.
        seed: which rows, and their order.
        bf16: compute in bfloat16 where that is safe (autocast); factors and optimizer stay float32.

    Raises:
        LowRankError: a number is out of range.
    """

    samples: int | None = None
    epochs: float = 2
    held_out: int = 256
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    batch_size: int = 32
    accumulate: int = 1
    hidden: float = 100.0
    patience: int = 4
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        samples = 1 if self.samples is None else self.samples
        counts = samples, self.held_out, self.batch_size, self.accumulate, self.patience
        if min(counts) < 1 or not 0 < self.epochs < math.inf or not 0 <= self.hidden < math.inf:
            raise LowRankError(
                "samples, held_out, batch_size, accumulate and patience must be at least 1, epochs above 0 and hidden "
                f"at least 0; they are {', '.join(map(str, counts))}, {self.epochs} and {self.hidden}"
            )
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise LowRankError(f"rates are learning rates above 0, at least one; they are {list(self.rates)}")
