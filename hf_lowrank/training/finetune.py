"""model + a task's training data → the same model, trained on them, and the facts of the run. Dense or compressed."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.checks import refuse_adapter
from hf_lowrank.model.weights import model_digest
from hf_lowrank.tasks import Task, collator, encode, load_split, load_validation
from hf_lowrank.tasks.data import content_digest
from hf_lowrank.tasks.encoding import lengths_of
from hf_lowrank.training.distillation import Distillation
from hf_lowrank.training.evaluate import evaluate_splits
from hf_lowrank.training.running import (
    ByLength,
    Watch,
    as_before,
    checkpoint_folder,
    last_checkpoint,
    trainer_arguments,
)
from hf_lowrank.training.settings import FinetuneConfig


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
        LowRankError: unusable data or settings; checkpoints of other settings, data or another teacher; a loss that is
            not finite; the model has an adapter.
    """
    config = FinetuneConfig(**settings)
    refuse_adapter(model)
    started, dtype, training = time.perf_counter(), model.dtype, model.training
    rows = encode(load_split(task, "train", data_dir), task, tokenizer, model.config)
    watched = config.evaluate_epochs or config.patience is not None
    validation = load_validation(task, data_dir, tokenizer, model.config) if score or watched else []
    if distillation is not None:
        distillation.check(model)
    described = asdict(config) | ({"distillation": distillation.describe()} if distillation else {})
    with checkpoint_folder(checkpoints) as folder, as_before(model):
        origin = {"model weights": model_digest(model), "task": task.name, "rows": len(rows)}
        origin |= {"teacher's weights": model_digest(distillation.teacher)} if distillation else {}
        read = content_digest([rows, *(validation if watched else [])], in_order=True)
        start = last_checkpoint(folder, described | origin | {"data": read}, resume)
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
        self.lengths = lengths_of(rows)
        if distillation is not None:
            nn.Module.to(distillation.teacher, arguments.device).eval()

    def follow(self, patience: int | None, progress: bool) -> None:
        """Set what watches the training."""
        self.remove_callback(PrinterCallback)  # it would print figures to stdout, which is for the result
        self.add_callback(Watch("fine-tuning", progress))
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return ByLength(self, self.lengths)

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


def _arguments(
    config: FinetuneConfig, folder: Path, task: Task, checkpoints: bool, checkpoint_steps: int | None
) -> TrainingArguments:
    stops = config.patience is not None
    saving = ("steps" if checkpoint_steps else "epoch") if checkpoints or stops else "no"
    if stops and checkpoint_steps:
        raise LowRankError("early stopping keeps the checkpoint of the best epoch; leave out the steps of checkpoints")
    return trainer_arguments(
        folder,
        config.batch_size,
        config.learning_rate,
        config.seed,
        config.bf16,
        num_train_epochs=config.epochs,
        lr_scheduler_type=config.schedule,
        eval_strategy="epoch" if stops or config.evaluate_epochs else "no",
        save_strategy=saving,
        save_steps=checkpoint_steps or 500,
        save_total_limit=1,
        load_best_model_at_end=stops,
        metric_for_best_model="score" if stops else None,
        greater_is_better=not task.lower_is_better if stops else None,
        logging_strategy="epoch",
    )


def _history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Loss, and score where it was measured, of every epoch."""
    epochs: dict[float, dict[str, float]] = {}
    for entry in log:
        known = {"loss": "loss", "eval_score": "score"}
        values = {name: float(entry[key]) for key, name in known.items() if key in entry}
        if values:
            epochs.setdefault(entry["epoch"], {"epoch": entry["epoch"]}).update(values)
    return [epochs[epoch] for epoch in sorted(epochs)]
