"""A saved model → what is needed to recognise it later: digests of its files, outputs for a fixed input."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.jobs.files import sha256_of
from hf_lowrank.model.probe import token_inputs
from hf_lowrank.nn.publishing_lowrank import CARD, PICTURE, RECORD

VALUES = 64
NOT_DIGESTED = (CARD, PICTURE, RECORD)  # card and record: later steps add to them


def fingerprint(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """{"files": {name: SHA-256}, "output": {"values", "shape"}} of a model and the folder it was saved to.

    "output" has a "skipped" instead, with the reason, where the model does not take token ids alone.
    """
    return {"files": file_digests(folder), "output": probe(model)}


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 by path within the folder, of all files but the model card and the record."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: sha256_of(path)
        for name, path in names.items()
        if name not in NOT_DIGESTED and not any(part.startswith(".") for part in Path(name).parts)
    }


def probe(model: PreTrainedModel) -> dict[str, Any]:
    """A sample of the model's first output for one fixed sequence: `VALUES` entries, evenly spread, and the shape."""
    try:
        output = probe_output(model)
    except Exception as error:  # models with other inputs raise what they like
        return {"skipped": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"values": sample(output), "shape": list(output.shape)}


@torch.no_grad()
def probe_output(model: PreTrainedModel) -> Tensor:
    """The first output (logits, or hidden states) for one fixed sequence of tokens, in float32 on the CPU.

    The model computes on its own device and in its own dtype, in evaluation mode, and is left in the mode it had.
    """
    training = model.training
    try:
        output = model.eval()(**{name: value.to(model.device) for name, value in token_inputs(model).items()})[0]
    finally:
        model.train(training)
    return output.float().cpu()


def sample(output: Tensor) -> list[float]:
    """`VALUES` entries of a tensor, evenly spread over its elements (all, if there are fewer)."""
    flat = output.flatten()
    places = torch.linspace(0, len(flat) - 1, min(VALUES, len(flat))).round().long()
    return flat[places].tolist()
