"""Labels of the data, drawn from the model, and all that it expects → scores and divergences from dense, over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import Options, Result, Row, mean_of
from benchmarks.study import SEEDS, Figures, Study
from hf_lowrank import CompressionConfig
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.predictions import predict
from hf_lowrank.statistics.batches import Batch
from hf_lowrank.statistics.labels import Labels, ModelLabels

# (method, allocation, share of the ranks)
STUDIED = (("kfac", "greedy", 0.2), ("kfac", "greedy", 0.1))
Studied = tuple[str, str, float]
SAMPLES = 512
KINDS = {"data": "labels of the data", "drawn": "drawn from the model", "model": "of the model"}


@dataclass(frozen=True)
class DrawnLabels(ModelLabels):
    """One class for each prediction, drawn from the model's softmax: what `ModelLabels` has in expectation."""

    def alone(self, model: PreTrainedModel, batch: Batch, numbers: Sequence[int]) -> Tensor:
        """−log p(y) of the drawn y of each sample, of its tokens the sum over √tokens."""
        predicted = predict(model, batch)
        rows = predicted.values.split(predicted.counts.tolist())
        losses = [_drawn(logits, self.seed, number) for logits, number in zip(rows, numbers, strict=True)]
        return torch.stack([loss.sum() / math.sqrt(max(len(loss), 1)) for loss in losses])

    together = alone


def _drawn(logits: Tensor, seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
    labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels, reduction="none")


def run(options: Options) -> Result:
    """Every studied method with statistics by every kind of labels, over calibration seeds."""
    study = Study(options, "labels")
    kinds = [kind for kind in KINDS if kind != "drawn" or study.task.kind != "regression"]  # there the same as "model"
    found: dict[tuple[str, Studied], list[Figures]] = {}
    with bar("labels", len(SEEDS) * len(kinds) * len(STUDIED), "models") as shown:
        for seed in SEEDS:
            for kind in kinds:
                for studied in STUDIED:
                    key = {"labels": kind, "seed": seed, "studied": list(studied)}
                    figures = study.row(key, lambda: _measured(study, kind, seed, studied))  # noqa: B023
                    found.setdefault((kind, studied), []).append(figures)
                    shown.update()
    return Result(
        f"{study.task.score} on {study.task.name} by the labels of the statistics; dense {study.dense:.2f}",
        [_row(studied, kind, found) for studied in STUDIED for kind in kinds],
        [
            f"No fine-tuning, one shot; {SAMPLES} samples, means ± standard errors over seeds "
            f"{', '.join(map(str, SEEDS))} of the calibration. From dense: {found[next(iter(found))][0]['measure']}; × "
            "is the mean as a share of that by the labels of the data."
        ],
        {"model": study.name, "task": study.task.name, "dense": study.dense},
    )


def _measured(study: Study, kind: str, seed: int, studied: Studied) -> Figures:
    method, allocation, ratio = studied
    labels: str | Labels = DrawnLabels(seed) if kind == "drawn" else kind
    statistics, _ = study.statistics(labels, seed, kind, SAMPLES)
    return study.measured(CompressionConfig(method, ratio, allocation, sequential=False), statistics)


def _row(studied: Studied, kind: str, found: dict[tuple[str, Studied], list[Figures]]) -> Row:
    method, allocation, ratio = studied
    figures = found[kind, studied]
    change = fmean(each["divergence"] for each in figures) / fmean(
        each["divergence"] for each in found["data", studied]
    )
    return {
        "method": f"{method}, {allocation}",
        "ranks": f"{ratio:.0%}",
        "labels": KINDS[kind],
        "score": mean_of([each["score"] for each in figures], 2),
        "from dense": mean_of([each["divergence"] for each in figures], 4),
        "×": f"{change:.2f}",
    }
