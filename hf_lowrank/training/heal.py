"""low-rank model + the dense one it was made from + texts without labels → the same model, its factors trained.

A short distillation of the factors alone. It never ends farther from the teacher than it began, on held-out texts.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Store
from hf_lowrank.jobs.distributed import agreed, on_main
from hf_lowrank.jobs.files import read_json, write_json
from hf_lowrank.model.checks import check_model, quantizer_of
from hf_lowrank.model.predictions import Readout
from hf_lowrank.model.targets import factorized_layers, weight_shape
from hf_lowrank.model.weights import is_sharded, model_digest
from hf_lowrank.nn.modeling_lowrank import LowRankMixin
from hf_lowrank.tasks import Task, collator, encode, load_split
from hf_lowrank.tasks.checks import checked_length
from hf_lowrank.tasks.data import content_digest, training_rows
from hf_lowrank.tasks.encoding import encode_chosen, lengths_of
from hf_lowrank.tasks.windows import rows_at_once
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.metric import hidden_metrics
from hf_lowrank.training.running import (
    Bar,
    SameBatches,
    as_before,
    checkpoint_folder,
    last_checkpoint,
    trainer_arguments,
)
from hf_lowrank.training.settings import HealConfig
from hf_lowrank.training.told import Batch, Teacher, Told

CHECKS = 4  # measurements on held-out texts in the course of a training
TRIAL = 1 / 8  # of the steps, for each rate that is tried
WARM_UP = 0.1  # of the steps
FEWEST, MOST = 2048, 4096  # texts to learn from, a quarter of all in between: a third of an epoch of training in time
MEASURED = 256  # texts on which it is measured how much errors of hidden states matter, or fewer windows
FARTHEST = 0.1  # a layer that was left alone and is farther from the teacher's, relatively, is another model's
RATE, BEST = "rate.json", "best"
DENSE_ONE = "give the dense model that this one was made from"


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data_dir: Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    readout: Readout | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train the factors of a low-rank `model`, in place, to say what its `teacher` says.

    The loss of a sample is the divergence of its predictions from the teacher's (see `divergences`; of tokens their
    mean) plus `hidden`, which falls to 0 in the course of the training, times the mean over blocks of the errors of
    their hidden states, weighed by how much they matter (see `hidden_metrics`): these say much of every token, where
    predictions of few are in doubt. No label is read. What the teacher says of texts that come again is kept, as far as
    memory goes, so that it is asked once. All other weights stay as they are, bit for bit, and dropout is off.

    Args:
        model: low-rank, with whole factors: neither quantized nor with an adapter.
        teacher: the dense model that it was made from. It is not changed.
        tokenizer: of both.
        task: whose training rows are read; a task of texts alone will do (see `texts_task`).
        data_dir: a folder with the task's files; None for the Hub's.
        dtype: in which the weights are to be stored; None for the model's. The result is judged as rounded to it.
        checkpoints: a folder for them; None for none.
        resume: go on with an interrupted run in `checkpoints`, to the same weights.
        progress: whether bars are shown.
        readout: what counts of the outputs, such as a text's embedding; None for what the model predicts.
        settings: those of `HealConfig`.

    Returns:
        `divergence_before` and `divergence_after` (held-out, in nats), `healed` (False where nothing better was
        found and the start kept), `learning_rate`, `tried` (rate and loss of each trial), `best_step`, `samples`,
        `held_out`, `steps`, `seconds` (of this call) and `settings`, plain JSON values.

    Raises:
        LowRankError: the model is not low-rank, quantized or sharded; the teacher is not the dense form of it; unusable
            data or settings; checkpoints of other settings or data.
    """
    config = HealConfig(**settings)
    check_teacher(model, teacher)
    started, training, own_dtype = time.perf_counter(), model.training, model.dtype
    task = task.without_labels()
    rows, held_out = _texts(tokenizer, task, data_dir, model, config)
    reference = Reference(teacher, tokenizer, task, [_by_length(held_out)], config.batch_size, readout)
    described = asdict(config) | {"rates": list(config.rates)}
    with checkpoint_folder(checkpoints) as folder, as_before(model):
        origin = {"model weights": model_digest(model), "teacher's weights": model_digest(teacher), "task": task.name}
        read = {"rows": len(rows), "data": content_digest([rows, held_out])}
        start = last_checkpoint(folder, described | origin | read, resume)
        place = PartialState().device
        nn.Module.to(teacher, place).eval()
        nn.Module.to(model, place, torch.float32)  # small steps would be rounded away in half precision
        with _factors_alone(model) as factors:
            healing = _Healing(model, teacher, factors, rows, reference, collator(task, tokenizer), config, progress)
            facts = _healed(healing, folder, start, checkpoints is not None, dtype or own_dtype)
    nn.Module.to(model.train(training), own_dtype)
    counts = {"samples": len(rows), "held_out": len(held_out), "seconds": time.perf_counter() - started}
    return facts | counts | {"settings": described}


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise unless `teacher` is the dense form of the low-rank `model`.

    Raises:
        LowRankError: the message says what does not fit.
    """
    _refuse_quantized(model)
    _refuse_quantized(teacher)
    check_model(model)
    check_model(teacher)
    if not isinstance(model, LowRankMixin) or is_sharded(model):
        problem = "is sharded by FSDP2" if is_sharded(model) else "is not a low-rank model: compress it first"
        raise LowRankError(f"the {type(model).__name__} {problem}; there are no whole factors to heal")
    if type(teacher) is not model.base_model_class:
        raise LowRankError(
            f"the teacher is a {type(teacher).__name__}, and the model a low-rank {model.base_model_class.__name__}: "
            f"{DENSE_ONE}"
        )
    layers, theirs = model.factorized_layers(), dict(teacher.named_modules())
    for name, layer in layers.items():
        if name in theirs and weight_shape(theirs[name]) != weight_shape(layer):
            shapes = f"{list(weight_shape(theirs[name]))}, the low-rank model's {list(weight_shape(layer))}"
            raise LowRankError(f"the teacher is another model: its {name} is {shapes}; {DENSE_ONE}")
    inside = tuple(f"{name}." for name in layers)
    own = {name: weight for name, weight in model.state_dict().items() if not name.startswith(inside)}
    for name, weight in teacher.state_dict().items():
        if name in own and weight.is_floating_point() and _farther(own[name], weight):
            raise LowRankError(f"the teacher is another model: its {name} is not the low-rank model's; {DENSE_ONE}")


def _refuse_quantized(model: PreTrainedModel) -> None:
    if isinstance(model, PreTrainedModel) and (quantizer := quantizer_of(model)) is not None:
        raise LowRankError(
            f"the {type(model).__name__} is quantized by {quantizer}, and healing trains whole weights by whole ones: "
            "heal the model as it was before, with the dense one as teacher, then quantize it"
        )


def _farther(weight: Tensor, other: Tensor) -> bool:
    """Whether two weights are not the same but for rounding and a little fine-tuning."""
    if weight.shape != other.shape:
        return True
    weight, other = weight.float(), other.to(weight.device).float()
    return bool((weight - other).norm() > FARTHEST * other.norm())


def _texts(
    tokenizer: PreTrainedTokenizerBase, task: Task, data_dir: Path | None, model: PreTrainedModel, config: HealConfig
) -> tuple[Dataset, Dataset]:
    """Training rows to learn from, and others to judge by, chosen by the seed.

    Both are from the end of the order whose first rows statistics are measured on: what factors were fitted to they
    reproduce better than what is new to them, and have less to learn from.
    """
    if task.packed:
        return _windows(tokenizer, task, data_dir, model, config)
    rows = load_split(task, "train", data_dir).shuffle(seed=config.seed)
    held = _held_out(len(rows), task, config.held_out)
    new = len(rows) - held
    wanted = min(new, config.samples or max(FEWEST, min(len(rows) // 4, MOST)))
    learnt, judged = rows.select(range(new - wanted, new)), rows.select(range(new, len(rows)))
    return encode(learnt, task, tokenizer, model.config), encode(judged, task, tokenizer, model.config)


def _windows(
    tokenizer: PreTrainedTokenizerBase, task: Task, data_dir: Path | None, model: PreTrainedModel, config: HealConfig
) -> tuple[Dataset, Dataset]:
    """As `_texts`, of windows of running text, which are known only once the text is read: those of another seed.

    Unless it is said how many, they hold as many tokens as the fewest texts do.
    """
    length = checked_length(task, tokenizer, model.config)
    held, wanted = task.at_once(config.held_out, length), config.samples or task.at_once(FEWEST, length)
    chosen: Any = (model.config, held + wanted, config.seed + 1)
    rows = encode_chosen(training_rows(task, data_dir), task, tokenizer, *chosen).shuffle(seed=config.seed)
    held = _held_out(len(rows), task, held)
    return rows.select(range(held, min(held + wanted, len(rows)))), rows.select(range(held))


def _held_out(count: int, task: Task, wanted: int) -> int:
    """How many of so many texts are judged by."""
    if count < 2:
        raise LowRankError(f"healing takes two texts at least, one to judge by; {task.name} has {count}")
    return min(wanted, count // 2)


def _by_length(rows: Dataset) -> Dataset:
    """Rows beside others of like lengths, so that next to nothing is padded."""
    lengths = lengths_of(rows)
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


@contextmanager
def _factors_alone(model: PreTrainedModel) -> Iterator[dict[str, nn.Parameter]]:
    """Within the block only the parameters of factorized layers take gradients; they are given by name."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inside = tuple(f"{name}." for name in factorized_layers(model))
    factors = {name: p for name, p in model.named_parameters() if name.startswith(inside)}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in factors)
        yield factors
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


@dataclass
class _Healing:
    """A model, its teacher and the texts, from which trainings begin, at one rate or another."""

    model: PreTrainedModel
    teacher: PreTrainedModel
    factors: dict[str, nn.Parameter]
    rows: Dataset
    reference: Reference
    collate: Callable[[list[Any]], Batch]
    config: HealConfig
    progress: bool

    @property
    def steps(self) -> int:
        """Of a whole training."""
        return max(1, round(self.config.epochs * math.ceil(len(self.rows) / self.batch)))

    @property
    def batch(self) -> int:
        """Rows of a step, over all processes."""
        parts = PartialState().num_processes * self.config.accumulate
        rows = rows_at_once(self.rows, self.reference.task, self.config.batch_size)
        return rows if rows == self.config.batch_size else -(-rows // parts) * parts

    def state(self) -> dict[str, Tensor]:
        """A copy of the factors, in main memory."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.factors.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Bring back factors of an earlier `state`."""
        for name, parameter in self.factors.items():
            parameter.copy_(state[name])

    @cached_property
    def told(self) -> Teacher:
        """The teacher, that says of a batch what it said before."""
        return Teacher(self.teacher, self.config.hidden > 0, self.reference.readout)

    @cached_property
    def metrics(self) -> list[Tensor]:
        """How much errors of hidden states matter; of none where they are not asked for."""
        count = rows_at_once(self.rows, self.reference.task, MEASURED)
        some = _by_length(self.rows.select(range(min(count, len(self.rows)))))
        loader = DataLoader(some, self.batch, collate_fn=self.collate)
        return hidden_metrics(self.told, loader) if self.config.hidden > 0 else []

    def losses(self, run: nn.Module, batch: Batch, left: float) -> Tensor:
        """The loss of every sample of a batch [samples], with a share `left` of the training to come.

        `run` is the model, wrapped or not.
        """
        told, inputs = self.told.says(batch), self.told.inputs(batch)
        said = Told.of(self.model, run(**inputs), batch, self.reference.readout)
        losses = told.divergence(said)
        if not said.hidden:
            return losses
        return losses + left * self.config.hidden * told.hidden_errors(said, batch, self.metrics)

    def divergence(self) -> float:
        """That of the model from its teacher, on the held-out texts; the main process's counts on all of them."""
        mean = agreed(self.reference.divergence(self.model, progress=False).mean)
        return mean if math.isfinite(mean) else math.inf

    def train(
        self, rate: float, steps: int, folder: Path, best: "_Best | None" = None, start: str | None = None, **saved: Any
    ) -> float:
        """`steps` steps at a learning rate; with `best`, measured on the way and at the end. The loss of the last."""
        checks = {"eval_strategy": "steps", "eval_steps": _check_steps(steps)} if best else {}
        if best and self.config.epochs <= 1:
            self.told.room = 0  # no batch comes again, but those of the trials
        arguments = trainer_arguments(
            folder,
            self.batch,
            rate,
            self.config.seed,
            self.config.bf16,
            self.config.accumulate,
            max_steps=steps,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(WARM_UP * steps)),
            logging_strategy="no",
            **{"save_strategy": "no"} | checks | saved,
        )
        trainer = _Trainer(self, arguments, best)
        trainer.remove_callback(PrinterCallback)  # it would print figures to stdout, which is for the result
        title = "healing" if best else f"trying the rate {rate:g}"
        for callback in (Bar(title, self.progress), *([best] if best else [])):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=start)
        if best and best.measured != trainer.state.global_step:
            best.judge(self.divergence(), trainer.state.global_step)
        return trainer.last_loss()


class _Trainer(Trainer):
    """transformers' Trainer with a teacher in the place of labels."""

    def __init__(self, healing: _Healing, arguments: Any, best: "_Best | None") -> None:
        super().__init__(
            healing.model,
            arguments,
            train_dataset=healing.rows,
            eval_dataset=healing.reference.validation[0],
            data_collator=healing.collate,
        )
        self.healing, self.best = healing, best
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the samples of a part
        self.lengths = lengths_of(healing.rows)
        self.losses: list[Tensor] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SameBatches(self, self.lengths)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_divergence": self.healing.divergence()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        left = 1 - self.state.global_step / self.healing.steps
        loss = self.healing.losses(model.eval(), inputs, left).mean()  # without dropout
        self.losses.append(loss.detach())
        return loss

    def last_loss(self) -> float:
        """The mean over the last quarter of the steps and over all processes; infinite where it is not finite."""
        last = self.losses[-math.ceil(len(self.losses) / 4) :]
        mean = float(self.accelerator.reduce(torch.stack(last).mean(), "mean")) if last else math.inf
        return mean if math.isfinite(mean) else math.inf


class _Best(TrainerCallback):
    """Keeps the factors of least divergence, and ends a training that no longer comes nearer."""

    def __init__(self, healing: _Healing, start: float, store: Store | None) -> None:
        self.healing, self.store = healing, store
        self.divergence, self.step, self.state, self.measured = start, 0, healing.state(), 0
        if store is not None and on_main(lambda: BEST in store.names()):
            self.state, facts = store.load(BEST)
            self.divergence, self.step = facts["divergence"], facts["step"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **rest: Any) -> None:
        self.judge(metrics["eval_divergence"], state.global_step)
        if state.global_step - self.step >= self.healing.config.patience * args.eval_steps:
            control.should_training_stop = True

    def judge(self, divergence: float, step: int) -> None:
        """Keep the factors as they are now, if they are the nearest so far."""
        self.measured = step
        if divergence < self.divergence:
            self.divergence, self.step, self.state = divergence, step, self.healing.state()
            if (store := self.store) is not None:
                on_main(lambda: store.save(BEST, (self.state, {"divergence": divergence, "step": step})))


def _healed(healing: _Healing, folder: Path, start: str | None, saves: bool, stored: torch.dtype) -> dict[str, Any]:
    """Find the rate, train, and leave the model with the best factors as stored, or with those it had; the facts."""
    before, beginning, steps = healing.divergence(), healing.state(), healing.steps
    store = Store(folder / BEST)
    _ = healing.metrics  # in full precision, before Trainer sets its own
    if start is None:
        on_main(store.remove)
    best = _Best(healing, before, store if saves else None)
    rate, tried = _rate(healing, folder, beginning, start is not None)
    saving = {"save_strategy": "steps", "save_steps": _check_steps(steps), "save_total_limit": 1} if saves else {}
    healing.train(rate, steps, folder, best, start, **saving)
    healing.restore({name: tensor.to(stored).float() for name, tensor in best.state.items()})
    after = best.divergence if stored == torch.float32 else healing.divergence()
    healed = best.step > 0 and after < before
    if not healed:
        healing.restore(beginning)
    facts = {"divergence_before": before, "divergence_after": after if healed else before, "healed": healed}
    return facts | {"learning_rate": rate, "tried": tried, "steps": steps, "best_step": best.step if healed else 0}


def _rate(
    healing: _Healing, folder: Path, beginning: dict[str, Tensor], resumed: bool
) -> tuple[float, list[dict[str, float]]]:
    """The rate that learns most in a short training, and the loss that each came to; what it learnt is kept.

    How near the predictions come to the teacher's says little so early: at the larger rates, which come nearest in the
    end, they first go away. So it is by the loss, and from the smallest rate up, until one is worse than that before.
    """
    if resumed and on_main((folder / RATE).is_file):
        found = on_main(lambda: read_json(folder / RATE))
        return found["rate"], found["tried"]
    rates = sorted(healing.config.rates)
    tried: list[dict[str, float]] = []
    best, least, learnt = rates[0], math.inf, beginning
    for rate in rates if len(rates) > 1 else ():
        healing.restore(beginning)
        loss = healing.train(rate, max(1, round(TRIAL * healing.steps)), folder)
        tried.append({"rate": rate, "loss": loss})
        if not loss < least:
            break
        best, least, learnt = rate, loss, healing.state()
    healing.restore(learnt)
    on_main(lambda: write_json(folder / RATE, {"rate": best, "tried": tried}))
    return best, tried


def _check_steps(steps: int) -> int:
    """How many steps lie between two measurements."""
    return math.ceil(steps / CHECKS)
