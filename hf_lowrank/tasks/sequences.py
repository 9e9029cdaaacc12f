"""Pairs of a text and what is to be written of it → inputs and labels of an encoder-decoder."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from hf_lowrank.jobs.progress import say_once
from hf_lowrank.model.predictions import IGNORED
from hf_lowrank.tasks.task import Task

WRITTEN = 128  # tokens at most that are written, or read as what should be
BESIDE = ("reference",)  # columns of encoded rows that are no inputs


LIBRARIES = {"rougeL": "rouge_score", "chrf": "sacrebleu"}  # by score: what computes it, an extra


def with_library(task: Task) -> Task:
    """The task, scored by perplexity where the library of its own score is not installed, which is told on stderr."""
    library = LIBRARIES.get(task.score)
    if library is None or find_spec(library) is not None:
        return task
    say_once(f"{library} is not installed (pip install {library}): {task.name} is scored by perplexity")
    return replace(task, score="perplexity", metrics=None)


def encode_pairs(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """Labels are the tokens of what is to be written."""
    source, target = batch[task.text[0]], batch[task.label]
    encoded = dict(tokenizer(source, truncation=True, max_length=length))
    labels = tokenizer(text_target=target, truncation=True, max_length=min(length, WRITTEN))["input_ids"]
    return encoded | {"labels": labels, "reference": list(target)}


class PairCollator:
    """Joins pairs, padding texts and labels.

    Args:
        tokenizer: is left as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token is None:  # never seen: padding is masked, and its labels are ignored
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        self.joined = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.joined([{key: value for key, value in row.items() if key not in BESIDE} for row in features]))


@torch.inference_mode()
def written(model: Any, tokenizer: Any, inputs: Mapping[str, Any]) -> list[str]:
    """What a model writes of every text of a batch, the likeliest token each time."""
    told = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    most = min(WRITTEN, (getattr(model.config, "max_position_embeddings", None) or WRITTEN + 1) - 1)
    ids = model.generate(**told, do_sample=False, num_beams=1, max_new_tokens=most)
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]
