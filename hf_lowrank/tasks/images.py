"""Images and their classes → inputs of an image classifier, read as its own image processor reads them."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from transformers import BaseImageProcessor

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import UNKNOWN
from hf_lowrank.tasks.task import Task


def stored_images(rows: Dataset, task: Task) -> Dataset:
    """The rows with images as they are stored, undecoded."""
    return rows.cast_column(task.text[0], Image(decode=False))


def encode_images(batch: dict, task: Task, processor: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """The bytes of every image, which batches are made of when they are needed.

    Raises:
        LowRankError: an image is missing or cannot be read.
    """
    images = [_bytes(image, task) for image in batch[task.text[0]]]
    labels = [UNKNOWN] * len(images) if task.label is None else [label_ids[label] for label in batch[task.label]]
    return {"encoded_image": images, "labels": labels}


def _bytes(image: Any, task: Task) -> bytes:
    from PIL import Image as Pillow  # here: of images alone, and an extra of datasets
    from PIL import UnidentifiedImageError

    name = "an image" if image is None else image.get("path") or "an image"
    try:
        found: bytes = image["bytes"] or Path(image["path"]).read_bytes()
        with Pillow.open(BytesIO(found)) as opened:
            opened.verify()
    except (OSError, SyntaxError, TypeError, UnidentifiedImageError) as error:
        raise LowRankError(f"{name} of {task.name} cannot be read as an image: {error}") from error
    return found


class ImageCollator:
    """Joins images, in colour, and their classes.

    Args:
        processor: the model's own.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image as Pillow

        images = [Pillow.open(BytesIO(row["encoded_image"])).convert("RGB") for row in features]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in features])}
