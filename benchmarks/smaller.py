"""A dense model and its task → one of the same family with half the blocks, taught by the dense one, in a folder."""

import copy
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.folder.loading import load_model
from hf_lowrank.jobs.files import atomic_folder
from hf_lowrank.model.blocks import list_of, outer_blocks
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.training.distillation import Distillation
from hf_lowrank.training.finetune import finetune

EPOCHS, RATE = 3, 1e-4
STEPS = 60  # from one checkpoint to the next


def half(pipeline: Pipeline, folder: Path) -> Any:
    """The model of half the blocks that `folder` holds; made there, or what was begun is gone on with.

    Each block is the second of a pair of the dense model's, and learns from labels, outputs and hidden states alike.
    """
    tokenizer, task = pipeline.reading
    if not folder.is_dir():
        model, dense = every_second(pipeline.model), copy.deepcopy(pipeline.model)
        checkpoints = folder.with_name(f"{folder.name}.checkpoints")
        settings: Any = {"epochs": EPOCHS, "learning_rate": RATE, "seed": 0, "bf16": True}
        where: Any = {"checkpoints": checkpoints, "checkpoint_steps": STEPS, "resume": True}
        teacher = Distillation(dense)
        finetune(model, tokenizer, task, pipeline.data_dir, distillation=teacher, score=False, **where, **settings)
        with atomic_folder(folder) as whole:
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
    return load_model(str(folder), task)[0]


@torch.no_grad()
def every_second(model: Any) -> Any:
    """A copy with every second block, the last among them, and all else as it is."""
    blocks = list(outer_blocks(model))
    kept = blocks[1::2]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    small, weights = type(model)(config), model.state_dict()
    source = {f"{list_of(name)}.{n}.": f"{name}." for n, name in enumerate(kept)}
    small.load_state_dict({name: weights[_renamed(name, source)] for name in small.state_dict()})
    return small.to(model.dtype).eval()


def _renamed(name: str, source: dict[str, str]) -> str:
    for here, there in source.items():
        if name.startswith(here):
            return there + name.removeprefix(here)
    return name
