"""The cost of Fisher information: relative to an ordinary training pass, and to taking one sample at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness import Options, Result, Row, Spread, alternate, ratio
from benchmarks.models import Batch, random_batches, random_bert
from hf_lowrank import compute_fisher
from hf_lowrank.model.targets import find_targets

SAMPLES = 256
BATCH_SIZES = (16, 32)
LAYERS, HIDDEN, VOCABULARY = 6, 384, 30_522
NAMES = {"element": "compute_fisher, element", "row": "compute_fisher, row", "naive": "one sample at a time"}


def run(options: Options) -> Result:
    """Time of `compute_fisher` in both forms over the same batches that training goes over."""
    model = random_bert(LAYERS, HIDDEN, VOCABULARY)
    cases = [_measure(model, batch_size, options.rounds) for batch_size in BATCH_SIZES]
    notes = [
        f"BERT of {LAYERS} layers, {HIDDEN}/{4 * HIDDEN}; {SAMPLES} samples of 16 to 64 tokens. Training: forward, "
        "loss and backward to every parameter, dropout on, no optimizer step; targets only: to the factorized "
        "weights alone, dropout off.",
        "Fixed: the check of the first batch and the digests of the weights, from the times of one batch and of two, "
        "as a share of the whole; it does not grow with the number of samples.",
    ]
    return Result(
        "fisher: compute_fisher relative to training over the same batches",
        [row for rows, _ in cases for row in rows],
        notes,
        {"cases": [figures for _, figures in cases]},
    )


def _measure(model: PreTrainedModel, batch_size: int, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    batches = random_batches(SAMPLES, batch_size, VOCABULARY)
    seconds = alternate(
        {
            "training": lambda: train_pass(model, batches),
            "targets only": lambda: targets_pass(model, batches),
            "element": lambda: compute_fisher(model, batches, "element", progress=False),
            "row": lambda: compute_fisher(model, batches, "row", progress=False),
            "naive": lambda: naive_fisher(model, batches),
        },
        rounds,
    )
    fixed = {form: _fixed_cost(model, batches[len(batches) // 2], form, rounds) for form in ("element", "row")}
    rows = [_row(batch_size, name, seconds, fixed.get(name)) for name in NAMES]
    figures = {"batch_size": batch_size, "seconds": seconds, "fixed": {f: s.values for f, s in fixed.items()}}
    return rows, figures


def _row(batch_size: int, name: str, seconds: dict[str, list[float]], fixed: Spread | None) -> Row:
    whole = Spread(tuple(seconds[name])).median
    return {
        "batch": str(batch_size),
        "what": NAMES[name],
        "seconds": f"{whole:.2f}",
        "/ training": ratio(seconds[name], seconds["training"]).text(),
        "/ training, targets only": ratio(seconds[name], seconds["targets only"]).text(),
        "one sample at a time / it": ratio(seconds["naive"], seconds[name]).text(),
        "of it fixed": f"{fixed.median / whole:.1%}" if fixed else "–",
    }


def _fixed_cost(model: PreTrainedModel, batch: Batch, form: Any, rounds: int) -> Spread:
    """Seconds that do not grow with the data: twice the time of one batch less the time of the same batch twice."""
    seconds = alternate(
        {
            "once": lambda: compute_fisher(model, [batch], form, progress=False),
            "twice": lambda: compute_fisher(model, [batch, batch], form, progress=False),
        },
        rounds,
    )
    return Spread(tuple(2 * once - twice for once, twice in zip(seconds["once"], seconds["twice"], strict=True)))


def train_pass(model: PreTrainedModel, batches: list[Batch]) -> None:
    """An epoch as a trainer goes through it, without the optimizer's steps."""
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()
    model.eval()


def targets_pass(model: PreTrainedModel, batches: list[Batch]) -> None:
    """The least that yields the weight gradients of the layers in question."""

    def over_batches(weights: list[nn.Parameter]) -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()

    with_gradients_of_targets(model, over_batches)


def naive_fisher(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Fisher information as it is usually written: every sample through the model, its gradient squared and added."""

    def over_samples(weights: list[nn.Parameter]) -> None:
        sums = [torch.zeros_like(weight) for weight in weights]
        for batch in batches:
            for n in range(len(batch["labels"])):
                tokens = int(batch["attention_mask"][n].sum())
                alone = {key: value[n : n + 1] for key, value in batch.items()}
                alone |= {key: alone[key][:, :tokens] for key in ("input_ids", "attention_mask")}
                model(**alone).loss.backward()
                for total, weight in zip(sums, weights, strict=True):
                    assert weight.grad is not None
                    total += weight.grad.square()
                model.zero_grad()

    with_gradients_of_targets(model, over_samples)


def with_gradients_of_targets(model: PreTrainedModel, body: Callable[[list[nn.Parameter]], Any]) -> None:
    """Call `body` with the targeted weights while only they collect gradients."""
    weights: list[Any] = [target.module.weight for target in find_targets(model).values()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    body(weights)
    model.requires_grad_(True)
