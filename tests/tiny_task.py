"""A tiny classification task and an encoder for it, in folders, and the command run in this process."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertModel, PreTrainedTokenizerFast

from hf_lowrank import cli
from tests.helpers import bert_config

WORDS = [f"w{n}" for n in range(40)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of `WORDS`, and BERT's special ones."""
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_cola(folder: Path) -> Path:
    """CoLA-like rows of 1 to 9 words, acceptable where the first word is one of the first twenty."""
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 60), ("validation", 20)):
        texts = [[WORDS[(n * 7 + k) % 40] for k in range(n % 9 + 1)] for n in range(count)]
        labels = [int(WORDS.index(words[0]) < 20) for words in texts]
        rows = Dataset.from_dict({"sentence": [" ".join(words) for words in texts], "label": labels})
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def write_encoder(folder: Path) -> Path:
    """A tiny encoder without a head, as a general pretrained model is."""
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `hf-lowrank words…`, in this process."""
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["hf-lowrank", *map(str, words)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    out, err = capfd.readouterr()
    return int(exit_info.value.code or 0), out, err
