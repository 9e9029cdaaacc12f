"""Tiny models and data for the examples, and the settings that make them take those."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, BertModel

from tests.helpers import bert_config, tiny_llama, word_tokenizer
from tests.tiny_task import WORDS, tiny_tokenizer, write_cola

NAMES = ("classifier", "embeddings", "language_model")


def settings(name: str, folder: Path) -> dict[str, str]:
    """Write the inputs of an example into a folder; the environment that makes it take them."""
    model, data = folder / "model", folder / "data"
    torch.manual_seed(0)
    {"classifier": _classifier, "embeddings": _embeddings, "language_model": _language_model}[name](model, data)
    task = {"classifier": "cola", "embeddings": "stsb", "language_model": "tinystories"}[name]
    paths = {"MODEL": str(model), "DATA": str(data), "OUTPUT": str(folder / "out")}
    return paths | {"TASK": task, "KEEP": "0.8", "SAMPLES": "8"}


def _classifier(model: Path, data: Path) -> None:
    BertForSequenceClassification(bert_config(num_labels=2)).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    write_cola(data)


def _embeddings(model: Path, data: Path) -> None:
    BertModel(bert_config(), add_pooling_layer=False).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    one, other = ([f"{WORDS[n]} {WORDS[(3 * n + k) % 40]}" for n in range(20)] for k in (1, 2))
    _write(data, {"sentence1": one, "sentence2": other, "label": [n % 5 / 4 for n in range(20)]})


def _language_model(model: Path, data: Path) -> None:
    tiny_llama().save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    _write(data, {"text": [" ".join(f"w{2 + (n * 5 + k) % 60}" for k in range(8)) for n in range(20)]})


def _write(folder: Path, columns: dict[str, list]) -> None:
    folder.mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
