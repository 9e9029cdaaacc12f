"""The text of `lm_text` → a small Llama trained on it, by transformers' Trainer, to go on after any interruption."""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from torch.utils.data import Subset
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from benchmarks.lm_text import Corpus, Windows, prepare
from benchmarks.models import LlamaShape
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.interrupts import MINUTES
from hf_lowrank.training.running import Watch, last_checkpoint, trainer_arguments

SHAPE = LlamaShape(hidden=256, intermediate=768, heads=8, key_value_heads=2, layers=6)
WATCHED = 32  # held-out windows that are scored at every checkpoint


@dataclass(frozen=True)
class Recipe:
    """A model and its training.

    Args:
        tokens: that it is trained on.
        warmup_steps: in which the learning rate rises; at most a tenth of all.
        decay: share of the steps, the last ones, in which it falls to zero: between them it is constant, so that a
            training can be made longer while it runs.
        bf16: whether products are computed in bfloat16, the weights in float32: on every machine alike, 1.6 times as
            fast as float32 on a CPU that has instructions for it, and slower on others.
    """

    corpus: Corpus = field(default_factory=Corpus)
    shape: LlamaShape = SHAPE
    length: int = 512
    batch: int = 4
    tokens: int = 6_000_000
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    decay: float = 0.2
    seed: int = 0
    bf16: bool = True

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return max(1, self.tokens // (self.batch * self.length))

    def model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model with random weights: grouped-query attention, RMSNorm, rotary positions, embeddings tied."""
        set_seed(self.seed)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = self.shape.config(len(tokenizer), self.length, tie_word_embeddings=True, **special)
        return LlamaForCausalLM(config)


class Paced(TrainerCallback):
    """A checkpoint after so many minutes of CPU time, with the perplexity on held-out text in a line of a log."""

    def __init__(self, minutes: float, held_out: Any, log: Path) -> None:
        self.minutes, self.held_out, self.log, self.saved = minutes, held_out, log, time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        due = time.process_time() - self.saved >= 60 * self.minutes
        control.should_save = due or state.global_step == state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        loss = _loss(model, self.held_out)
        rate = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        line = {"step": state.global_step, "loss": rate, "held-out loss": loss, "perplexity": math.exp(loss)}
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        self.saved = time.process_time()


def cache_folder(given: Path | None) -> Path:
    """Where text and model are kept: `given`, or beside what else is cached for Hugging Face's libraries."""
    return given or cached_assets_path("hf_lowrank", "benchmarks", "lm")


def train(folder: Path, recipe: Recipe, minutes: float = MINUTES, progress: bool = True) -> Path:
    """Train, or go on with a training that was interrupted; the folder of the finished model.

    Raises:
        LowRankError: as `prepare`; checkpoints of another recipe.
    """
    tokenizer, training, held_out = prepare(folder / "text", recipe.corpus)
    windows = Windows(training, recipe.length)
    settings = asdict(recipe.shape) | {
        name: value for name, value in asdict(recipe).items() if name not in ("tokens", "corpus", "shape")
    }
    checkpoints = folder / "checkpoints"
    start = last_checkpoint(checkpoints, settings, resume=True)
    arguments = trainer_arguments(
        checkpoints,
        recipe.batch,
        recipe.learning_rate,
        recipe.seed,
        bf16=recipe.bf16,
        max_steps=recipe.steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(recipe.decay * recipe.steps), "decay_type": "1-sqrt"},
        warmup_steps=min(recipe.warmup_steps, recipe.steps // 10),
        adam_beta2=0.99,
        save_strategy="no",  # by the clock, see `Paced`
        save_total_limit=2,
        logging_steps=50,
    )
    trainer = Trainer(recipe.model(tokenizer), arguments, train_dataset=windows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch("training", progress))
    trainer.add_callback(Paced(minutes, _first(held_out, recipe.length), folder / "training.jsonl"))
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model(str(folder / "model"))
    return folder / "model"


def trained(folder: Path) -> tuple[Path, int]:
    """The model of `folder`, finished or as its training stands, and the tokens that it has seen.

    Raises:
        LowRankError: there is none yet.
    """
    states = sorted((folder / "checkpoints").glob("checkpoint-*/trainer_state.json"), key=_step)
    if not states:
        raise LowRankError(f"no language model is in {folder}: train it with `python -m benchmarks lm --train`")
    recipe = json.loads((folder / "checkpoints" / "finetuning.json").read_text())
    whole = folder / "model"
    finished = (whole / "model.safetensors").is_file() and json.loads(states[-1].read_text())["max_steps"] == _step(
        states[-1]
    )
    return (whole if finished else states[-1].parent), _step(states[-1]) * recipe["batch"] * recipe["length"]


def _step(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])


def _first(tokens: np.ndarray, length: int) -> Subset:
    """Windows spread evenly over the text."""
    windows = Windows(tokens, length)
    return Subset(windows, np.linspace(0, len(windows) - 1, min(WATCHED, len(windows))).astype(int).tolist())


@torch.inference_mode()
def _loss(model: PreTrainedModel, rows: Any) -> float:
    """Mean cross-entropy in nats per token."""
    was = model.training
    model.eval()
    losses = [float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss) for row in rows]
    model.train(was)
    return sum(losses) / len(losses)
