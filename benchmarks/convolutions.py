"""A small ResNet that reads handwritten digits: its test accuracy when all of its convolutions are factorized."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.optim.swa_utils import update_bn
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, set_seed

from benchmarks.harness import Options, Result, Row
from hf_lowrank import METHODS, CompressionConfig, compress, compute_statistics
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import find_targets

INCLUDE = ("convolution",)
COMPARED = (
    ("svd", "uniform"),
    ("fwsvd", "uniform"),
    ("tfwsvd", "uniform"),
    ("kfac", "uniform"),
    ("svd", "greedy"),
    ("tfwsvd", "greedy"),
    ("kfac", "greedy"),
)
RANK_RATIOS = (0.5, 0.33, 0.2, 0.1, 0.05)
SIZE, BATCH, EPOCHS, LEARNING_RATE, SEED = 32, 64, 40, 2e-3, 0
SHAPE: dict[str, Any] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128],
    "depths": [2, 2, 2],
    "layer_type": "basic",
}
Images = dict[str, Tensor]


def run(options: Options) -> Result:
    """Accuracy of each method and allocation at each rank ratio, without fine-tuning."""
    training, test = digits()
    model = train(training)
    needs = dict.fromkeys(need for method, _ in COMPARED for need in METHODS[method].needs_for(losses=True))
    statistics = compute_statistics(model, _batches(training), list(needs), include=INCLUDE, progress=False)
    rows: list[Row] = []
    figures = []
    dense, layers = accuracy(model, test), len(find_targets(model, INCLUDE))
    with bar("convolutions", len(COMPARED) * len(RANK_RATIOS), "models") as shown:
        for method, allocation in COMPARED:
            row = {"method": method, "ranks": allocation}
            for ratio in RANK_RATIOS:
                config = CompressionConfig(method, ratio, allocation, include=INCLUDE)
                low_rank, report = compress(copy.deepcopy(model), config, statistics, progress=False)
                share, scored = report.targeted_after / report.targeted_before, accuracy(low_rank, test)
                again = accuracy(normalised(low_rank, training), test)
                row[f"{ratio:.0%}"] = f"{scored:.1f}, {again:.1f} ({share:.0%})"
                facts = {"method": method, "allocation": allocation, "rank_ratio": ratio, "parameters": share}
                figures.append({**facts, "accuracy": scored, "accuracy_normalised": again})
                shown.update()
            rows.append(row)
    return Result(
        f"accuracy (%) on {len(test['labels'])} handwritten digits by rank ratio; dense {dense:.1f}",
        rows,
        [
            "Accuracy as compressed; with the running statistics of batch normalization measured again on the training "
            f"images, without labels; in brackets the parameters left of those of the {layers} convolutions. Data: "
            "scikit-learn's digits, half of them for training and for statistics. No fine-tuning."
        ],
        {"dense": dense, "models": figures},
    )


def digits() -> tuple[Images, Images]:
    """(training, test) halves of the 1,797 digits of scikit-learn, 8 × 8 pixels each, enlarged to `SIZE` squared."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear")
    halves = train_test_split(range(len(pixels)), test_size=0.5, random_state=SEED, stratify=data.target)
    labels = torch.tensor(data.target)
    training, test = ({"pixel_values": pixels[half], "labels": labels[half]} for half in halves)
    return training, test


def train(images: Images, epochs: int = EPOCHS) -> PreTrainedModel:
    """A ResNet trained from random weights, by AdamW with a learning rate that falls to zero."""
    set_seed(SEED)
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **SHAPE)).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    steps = epochs * -(-len(images["labels"]) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with bar("training", epochs, "epochs") as shown:
        for _ in range(epochs):
            order = torch.randperm(len(images["labels"]))
            for batch in _batches({key: value[order] for key, value in images.items()}):
                model(**batch).loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            shown.update()
    return model.eval()


def normalised(model: PreTrainedModel, images: Images) -> PreTrainedModel:
    """The model, in place, with the means and variances that its batch normalization meets on these images."""
    update_bn((batch["pixel_values"] for batch in _batches(images)), model)
    return model


@torch.inference_mode()
def accuracy(model: PreTrainedModel, images: Images) -> float:
    """The share of images that are recognised, in percent."""
    hits = [(model(**batch).logits.argmax(dim=1) == batch["labels"]).float().sum() for batch in _batches(images)]
    return 100 * float(sum(hits)) / len(images["labels"])


def _batches(images: Images) -> list[Images]:
    parts = zip(*(value.split(BATCH) for value in images.values()), strict=True)
    return [dict(zip(images, part, strict=True)) for part in parts]
