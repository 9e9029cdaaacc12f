"""Texts and lists of labels, each of which may apply → inputs of a classifier with a yes or no for every label."""

from typing import Any

import torch
from transformers import DataCollatorWithPadding

from hf_lowrank.model.predictions import UNKNOWN
from hf_lowrank.tasks.task import Task


def encode_labels(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """Labels are a 1 or 0 for each label of the model."""
    encoded = dict(tokenizer(batch[task.text[0]], truncation=True, max_length=length))
    if task.label is None:
        return encoded | {"labels": [UNKNOWN] * len(encoded["input_ids"])}
    chosen = [{label_ids[label] for label in labels} for labels in batch[task.label]]
    flags = [[int(number in own) for number in range(len(label_ids))] for own in chosen]
    return encoded | {"labels": flags}


class FlagsCollator(DataCollatorWithPadding):
    """Joins rows; their labels become floats, by which transformers tells flags from classes."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(super().__call__(features))
        several = isinstance(batch.get("labels"), torch.Tensor) and batch["labels"].ndim == 2
        return batch | {"labels": batch["labels"].float()} if several else batch
