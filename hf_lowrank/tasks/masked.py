"""Texts → inputs of a masked language model: some tokens of each are masked, and are its labels."""

from typing import Any

import numpy as np

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import IGNORED
from hf_lowrank.tasks.task import Task

MASKED = 0.15  # the share of a text's tokens that a masked language model is to tell


def encode_masked(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """Some tokens of a text, chosen by the text alone, are masked, and are its labels.

    Raises:
        LowRankError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise LowRankError(f"{task.name} needs a tokenizer with a mask token for a masked language model")
    encoded = dict(tokenizer(batch[task.text[0]], truncation=True, max_length=length, return_special_tokens_mask=True))
    special = encoded.pop("special_tokens_mask")
    encoded["labels"] = [[IGNORED] * len(ids) for ids in encoded["input_ids"]]
    for ids, labels, specials in zip(encoded["input_ids"], encoded["labels"], special, strict=True):
        ordinary = [place for place, is_special in enumerate(specials) if not is_special]
        count = min(len(ordinary), max(1, round(MASKED * len(ordinary))))
        for place in np.random.default_rng(ids).choice(ordinary, count, replace=False).tolist() if count else ():
            labels[place], ids[place] = ids[place], tokenizer.mask_token_id
    return encoded
