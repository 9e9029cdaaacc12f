"""A student's and its teacher's outputs for one batch → the loss that draws the student to the teacher."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import IGNORED, divergences, read, unlabelled


@dataclass(frozen=True)
class Distillation:
    """Learning from a teacher: loss = (1 - `logits`) task + `logits` T² KL(teacher ‖ student) + `hidden` MSE(hidden).

    Logits by Hinton, Vinyals & Dean (2015), with the temperature T; of a regression their squared difference. Hidden
    states by Sun et al. (2019): those after every block of the student and the block of the teacher at the same share
    of its depth, over tokens that are not padding.

    Args:
        teacher: a model of the same task, labels and tokenizer, usually the dense one. It is not changed.
        temperature: above 0; softens both distributions.
        logits: weight of the logits' term in [0, 1], the task's own loss having the rest.
        hidden: weight of the hidden states' term, at least 0. It needs equal widths.

    Raises:
        LowRankError: a weight or the temperature is out of range.
    """

    teacher: PreTrainedModel
    temperature: float = 2.0
    logits: float = 0.5
    hidden: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 <= self.logits <= 1 and self.hidden >= 0):
            raise LowRankError(
                "distillation takes a temperature above 0, a weight of the logits in [0, 1] and one of the hidden "
                f"states of at least 0; they are {self.temperature}, {self.logits} and {self.hidden}"
            )

    def check(self, student: PreTrainedModel) -> None:
        """Raise where the two cannot be compared.

        Raises:
            LowRankError: their labels, widths or depths do not fit each other.
        """
        ours, theirs = student.config, self.teacher.config
        words, known = (getattr(config, "vocab_size", 0) for config in (ours, theirs))  # none of images
        if ours.num_labels != theirs.num_labels or words != known:
            raise LowRankError(
                f"the teacher has {theirs.num_labels} labels and {known} tokens, the model {ours.num_labels} and "
                f"{words}: a teacher knows the same task and has the same tokenizer"
            )
        depths = theirs.num_hidden_layers, ours.num_hidden_layers
        if self.hidden and ours.is_encoder_decoder:
            raise LowRankError("of an encoder-decoder the logits alone are learnt; give hidden states a weight of 0")
        if self.hidden and (ours.hidden_size != theirs.hidden_size or depths[0] % depths[1]):
            raise LowRankError(
                f"the teacher's {depths[0]} hidden states of width {theirs.hidden_size} do not fit the model's "
                f"{depths[1]} of {ours.hidden_size}; learn from its logits only, with a weight of 0 for hidden states"
            )

    def describe(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return {"temperature": self.temperature, "logits": self.logits, "hidden": self.hidden}

    def loss(self, task_loss: Tensor, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """The whole loss of a batch, from the task's own and the student's outputs (hidden states, if weighted)."""
        with torch.no_grad():
            told = self.teacher(**unlabelled(self.teacher, batch), output_hidden_states=self.hidden > 0)
        loss = (1 - self.logits) * task_loss
        loss = loss + self.logits * self._of_logits(outputs, told, batch)
        if self.hidden:
            loss = loss + self.hidden * _hidden_loss(outputs.hidden_states, told.hidden_states, batch)
        return loss

    def _of_logits(self, outputs: Any, told: Any, batch: dict[str, Tensor]) -> Tensor:
        own = read(self.teacher, outputs, batch) if _is_other(self.teacher, outputs) else None
        if own is None:
            counted = _counted(outputs.logits, batch)
            return _logits_loss(outputs.logits, told.logits, counted, self.temperature)
        theirs = read(self.teacher, told, batch)
        soft = (replace(found, values=found.values / self.temperature) for found in (theirs, own))
        return self.temperature**2 * divergences(*soft).mean()


def _is_other(model: PreTrainedModel, outputs: Any) -> bool:
    """Whether outputs are of labels that may each apply, or of where answers begin and end."""
    flags = model.config.problem_type == "multi_label_classification"
    return flags or getattr(outputs, "logits", None) is None


def _counted(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Which rows of the logits a label speaks of: [batch] for whole sequences, else [batch, tokens]."""
    if logits.ndim == 2:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return batch["labels"] != IGNORED


def _logits_loss(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    student, teacher = student[counted].float(), teacher[counted].float()
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    student, teacher = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Tensor:
    """The mean squared difference after the student's blocks; the first of both tuples are the embeddings."""
    step = (len(teacher) - 1) // (len(student) - 1)
    pairs = zip(student[1:], teacher[step::step], strict=True)
    mask = batch.get("attention_mask")  # none of images, whose patches all count
    kept = ... if mask is None else mask.bool()
    return torch.stack([F.mse_loss(ours[kept].float(), theirs[kept].float()) for ours, theirs in pairs]).mean()
