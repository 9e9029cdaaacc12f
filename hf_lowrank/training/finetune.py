"""model + a task's training data → the same model, trained on them, and the facts of the run. Dense or compressed."""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.claims import differences
from hf_lowrank.jobs.files import read_json, write_json
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.checks import refuse_adapter
from hf_lowrank.model.weights import model_digest
from hf_lowrank.tasks import Task, collator, encode, load_split, load_validation
from hf_lowrank.training.distillation import Distillation
from hf_lowrank.training.evaluate import evaluate_splits
from hf_lowrank.training.settings import FinetuneConfig

SETTINGS = "finetuning.json"  # beside the checkpoints: what they belong to


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data_dir: Path | None = None,
    *,
    distillation: Distillation | None = None,
    checkpoints: Path | None = None,
    checkpoint_steps: int | None = None,
    resume: bool = False,
    score: bool = True,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Train `model` on a task's training rows, in place. `settings` are those of `FinetuneConfig`.

    Args:
        distillation: learn from a teacher besides the labels.
        checkpoints: a folder for them; an interrupted run goes on from there with `resume` to the same weights. Without
            it there are none.
        checkpoint_steps: a checkpoint after so many steps instead of after every epoch.
        score: score the validation data at the end, in full precision.

    Returns:
        `score` and `metrics` (with `score`), `loss` (of the last epoch logged), `history` (by epoch), `samples`,
        `steps`, `seconds` (of this call) and `settings`, plain JSON values.

    Raises:
        LowRankError: unusable data or settings; checkpoints of other settings; a loss that is not finite; the model has
            an adapter.
    """
    config = FinetuneConfig(**settings)
    refuse_adapter(model)
    started, dtype, training = time.perf_counter(), model.dtype, model.training
    rows = encode(load_split(task, "train", data_dir), task, tokenizer, model.config)
    wants_validation = score or config.evaluate_epochs or config.patience is not None
    validation = load_validation(task, data_dir, tokenizer, model.config) if wants_validation else []
    if distillation is not None:
        distillation.check(model)
    described = asdict(config) | ({"distillation": distillation.describe()} if distillation else {})
    with _folder(checkpoints) as folder, _as_before(model):
        origin = {"model weights": model_digest(model), "task": task.name, "rows": len(rows)}
        start = _last_checkpoint(folder, described | origin, resume)
        nn.Module.to(model, torch.float32)  # small steps would be rounded away in half precision
        arguments = _arguments(config, folder, task, checkpoints is not None, checkpoint_steps)
        trainer = _Trainer(model, arguments, rows, tokenizer, task, validation, distillation)
        trainer.follow(config.patience, progress)
        trainer.train(resume_from_checkpoint=start)
    nn.Module.to(model.train(training), dtype)
    facts: dict[str, Any] = {
        "history": _history(trainer.state.log_history),
        "samples": len(rows),
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - started,
        "settings": described,
    }
    facts["loss"] = facts["history"][-1]["loss"] if facts["history"] else None
    if score:
        facts["metrics"] = evaluate_splits(model, tokenizer, task, validation, progress=progress)
        facts["score"] = facts["metrics"]["score"]
    return facts


class _Trainer(Trainer):
    """transformers' Trainer with our order of rows, our scores, and a teacher if there is one."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        validation: list[Dataset],
        distillation: Distillation | None,
    ) -> None:
        super().__init__(
            model, arguments, train_dataset=rows, eval_dataset=validation, data_collator=collator(task, tokenizer)
        )
        self.student, self.tokenizer, self.task = model, tokenizer, task
        self.validation, self.distillation = validation, distillation
        self.lengths = [len(ids) for ids in rows["input_ids"]]
        if distillation is not None:
            nn.Module.to(distillation.teacher, arguments.device).eval()

    def follow(self, patience: int | None, progress: bool) -> None:
        """Set what watches the training."""
        self.remove_callback(PrinterCallback)  # it would print figures to stdout, which is for the result
        self.add_callback(_Watch(progress))
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return _ByLength(self, self.lengths)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        result = evaluate_splits(self.student, self.tokenizer, self.task, self.validation, progress=False)
        metrics = {f"eval_{key}": value for key, value in result.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if self.distillation is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = inputs | {"output_hidden_states": self.distillation.hidden > 0}
        loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        with self.accelerator.autocast():
            loss = self.distillation.loss(loss, outputs, inputs)
        return (loss, outputs) if return_outputs else loss


class _ByLength(Sampler):
    """A new order in every epoch, by the seed and the epoch alone, so that a resumed epoch goes on in its own order."""

    def __init__(self, trainer: Trainer, lengths: list[int]) -> None:
        self.trainer, self.lengths = trainer, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        arguments = self.trainer.args
        epoch = int(self.trainer.state.epoch or 0)
        seed = int(np.random.SeedSequence([arguments.seed, epoch]).generate_state(1)[0])
        batch = arguments.train_batch_size * arguments.world_size
        return iter(get_length_grouped_indices(self.lengths, batch, generator=torch.Generator().manual_seed(seed)))


class _Watch(TrainerCallback):
    """Our progress bar, on stderr, instead of the Trainer's own; and the end of a run that diverges."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown = bar("fine-tuning", state.max_steps, "steps", self.progress)
        self.shown.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise LowRankError(
                f"the training diverged: its loss is {logs['loss']} after {state.global_step} steps; "
                "lower the learning rate"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.close()


def _arguments(
    config: FinetuneConfig, folder: Path, task: Task, checkpoints: bool, checkpoint_steps: int | None
) -> TrainingArguments:
    state = PartialState()
    if config.batch_size % state.num_processes:
        raise LowRankError(f"a batch of {config.batch_size} rows cannot be shared by {state.num_processes} processes")
    stops = config.patience is not None
    saving = ("steps" if checkpoint_steps else "epoch") if checkpoints or stops else "no"
    if stops and checkpoint_steps:
        raise LowRankError("early stopping keeps the checkpoint of the best epoch; leave out the steps of checkpoints")
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        per_device_train_batch_size=config.batch_size // state.num_processes,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=state.device.type == "cpu",
        average_tokens_across_devices=False,  # processes have equal shares of every batch
        eval_strategy="epoch" if stops or config.evaluate_epochs else "no",
        save_strategy=saving,
        save_steps=checkpoint_steps or 500,
        save_total_limit=1,
        load_best_model_at_end=stops,
        metric_for_best_model="score" if stops else None,
        greater_is_better=not task.lower_is_better if stops else None,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=state.device.type != "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are several processes, never DataParallel
    return arguments


@contextmanager
def _folder(checkpoints: Path | None) -> Iterator[Path]:
    """The folder of the checkpoints, or a temporary one."""
    if checkpoints is not None:
        yield checkpoints
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


@contextmanager
def _as_before(model: PreTrainedModel) -> Iterator[None]:
    """Take mixed precision off the model's forward again, which Accelerate leaves on it."""
    names = ("forward", "_original_forward")
    own = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)


def _last_checkpoint(folder: Path, settings: dict[str, Any], resume: bool) -> str | None:
    """The last whole checkpoint of an interrupted run with these settings, which are noted for the next one.

    Raises:
        LowRankError: there are checkpoints but `resume` is off, or they belong to a run with other settings.
    """
    path = folder / SETTINGS
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    if whole and path.is_file():
        if not resume:
            raise LowRankError(f"{folder} holds the checkpoints of an interrupted run; resume it, or delete the folder")
        for name, before, now in differences(read_json(path), settings):
            raise LowRankError(
                f"{folder} holds checkpoints of a run with {name} {before!r}, not {now!r}; "
                "resume it with its own settings, or delete the folder"
            )
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_json(path: Path) -> bool:
    """Whether a checkpoint was finished: this file is written last."""
    try:
        read_json(path)
    except LowRankError:
        return False
    return True


def _history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Loss, and score where it was measured, of every epoch."""
    epochs: dict[float, dict[str, float]] = {}
    for entry in log:
        known = {"loss": "loss", "eval_score": "score"}
        values = {name: float(entry[key]) for key, name in known.items() if key in entry}
        if values:
            epochs.setdefault(entry["epoch"], {"epoch": entry["epoch"]}).update(values)
    return [epochs[epoch] for epoch in sorted(epochs)]
