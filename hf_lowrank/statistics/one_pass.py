"""The state of one pass over the data: samples → the model's own losses, backward, and every layer's statistics."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import Result, from_everyone, summed
from hf_lowrank.model.targets import Target
from hf_lowrank.model.weights import digest
from hf_lowrank.statistics.batches import Batch, Marked, Marks, Split, batch_size, selected
from hf_lowrank.statistics.container import Statistics
from hf_lowrank.statistics.hooks import Deliver, Read, Recorder
from hf_lowrank.statistics.kinds import KINDS, accumulate, completed, sum_shape
from hf_lowrank.statistics.labels import Labels, Losses
from hf_lowrank.statistics.losses import NotSeparable, is_regression
from hf_lowrank.statistics.shared import InputSums

# A batch of two and the same samples alone must agree to this relative difference before batches are relied on.
AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_PRECISION_AGREEMENT = 0.2

# What a pass counts besides its sums.
COUNTED = ("seen", "samples", "tokens", "labels", "batches", "loss", "regression")


class Part(NamedTuple):
    """What is run at once: a batch, and the numbers of its samples in the order of the data."""

    batch: Batch
    numbers: list[int]


class Pass:
    """The state of one pass: the sums so far, and how samples are fed to the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        sharded: bool,
        targets: dict[str, Target],
        devices: dict[str, torch.device],
        kinds: Sequence[str],
        given: Statistics | None,
        split: Split | None,
        labels: Labels,
    ) -> None:
        self.model, self.sharded, self.targets, self.devices = model, sharded, targets, devices
        self.given, self.split, self.source = given, split, labels
        self.kinds = [kind for kind in kinds if not KINDS[kind].of_input]
        of_input = [kind for kind in kinds if KINDS[kind].of_input]
        self.shared = InputSums(of_input, targets, devices) if of_input else None
        self.contexts: dict[tuple[str, str], Any] = {}
        # Whether batches are run at once: decided on the first one with two samples, and not done until then.
        self.together: bool | None = False if split is not None else None
        self.sums = self._empty(self.kinds)
        self.seen = self.samples = self.tokens = self.labels = self.batches = 0
        self.loss, self.regression, self.restored = 0.0, False, False
        self.marks: Marks | None = None
        self.place = PartialState().device if model.device.type == "meta" else model.device  # offloaded: hooks move it
        self.finite: dict[str, Tensor] = {}
        self.recorder = Recorder()

    def add(self, batch: Batch, counts: bool = True) -> None:
        """Add the samples of one batch to the sums, or only run the model on them while other processes count.

        Raises:
            LowRankError: a loss or gradient is not finite, or the samples cannot be told apart.
        """
        batch = send_to_device(dict(batch), self.place)
        parts, size = self.parts(batch)
        for step in range(max(self._everyone(len(parts)))):
            idle = not counts or step >= len(parts)
            part = parts[step] if step < len(parts) else self._any_sample(batch)
            losses_of = self.source.together if self.together else self.source.alone
            try:
                losses = self._backward(part, losses_of, None if idle else self.deliver, None if idle else self.read)
            except NotSeparable:
                raise not_separable(self.model) from None
            if self.shared is not None:
                self.shared.end_batch()
            if not idle:
                self.count(part, losses)
        self.batches += 1
        self.seen += size if counts else 0

    def parts(self, batch: Batch) -> tuple[list[Part], int]:
        """What of a batch is run at once, all of it or single samples, without those that have no label; its size."""
        if self.split is not None:
            alone = [Part(sample, [self.seen + n]) for n, sample in enumerate(self.split(batch))]
            return [part for part in alone if self.source.known(self.model, part.batch)], len(alone)
        known = self.source.known(self.model, batch)
        if self.together is None:
            self.together = self._can_run_together(batch, known)
        together = [known] if known else []
        groups = together if self.together else [[n] for n in known]
        return [self.part(batch, numbers) for numbers in groups], batch_size(batch)

    def part(self, batch: Batch, samples: list[int]) -> Part:
        return Part(selected(batch, samples), [self.seen + n for n in samples])

    def _any_sample(self, batch: Batch) -> Part:
        """Something to run the model on, to no end but that other processes do."""
        return Part(next(iter(self.split(batch))), [0]) if self.split is not None else self.part(batch, [0])

    def count(self, part: Part, losses: Tensor) -> None:
        self.loss += float(losses.double().sum())
        self.regression = is_regression(self.model, part.batch)
        self.samples += len(part.numbers)
        self.labels += self.source.count(self.model, part.batch, len(part.numbers))
        self.tokens += int(part.batch["attention_mask"].sum()) if "attention_mask" in part.batch else 0
        if self.marks is not None and self.shared is not None:
            self.marks.append(Marked(part.batch, self.shared.active))
            self.shared.active = {}

    def state(self) -> Result:
        """Everything that has been found out, between two batches."""
        tensors = {f"sum/{kind}/{name}": total for kind, sums in self.sums.items() for name, total in sums.items()}
        cells, members = self.shared.state() if self.shared is not None else ({}, [])
        facts = {name: getattr(self, name) for name in COUNTED} | {"together": self.together}
        facts["whose"] = self.source.origin
        return tensors | {f"cell/{key}": total for key, total in cells.items()}, facts | {"members": members}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            LowRankError: it is by other labels.
        """
        if facts["whose"] != self.source.origin:
            raise LowRankError(
                f"the unfinished statistics are by the labels of the {facts['whose']}, not of the "
                f"{self.source.origin}; resume them with their own, or start again with --overwrite"
            )
        for kind, sums in self.sums.items():
            for name, total in sums.items():
                total.copy_(tensors[f"sum/{kind}/{name}"])
        cells = {key.removeprefix("cell/"): total for key, total in tensors.items() if key.startswith("cell/")}
        if self.shared is not None:
            self.shared.restore(cells, facts["members"])
        for name in COUNTED:
            setattr(self, name, facts[name])
        self.together, self.restored = facts["together"], True

    def read(self, key: Hashable, readers: tuple[str, ...], x: Tensor, largest: Tensor) -> None:
        """Add one input's share of a batch to what inputs alone decide (see `Recorder`)."""
        if self.shared is not None:
            self.shared.arrive(key, readers, x, largest)

    def deliver(self, name: str, x: Tensor, g: Tensor, largest: Tensor) -> None:
        """Add one layer's share of a batch (see `Recorder`)."""
        x, g = self._reached(name, x, g, largest)
        for kind in self.kinds:
            accumulate(kind, self.sums[kind][name], x, g, self._context(kind, name))

    def _reached(self, name: str, x: Tensor, g: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's share of a batch in float32 where there is a gradient; whether that is finite is noted."""
        self.finite[name] = torch.isfinite(largest).all(dim=1)
        reached = (largest != 0).any(dim=0)  # elsewhere, as behind a last layer's attention, there is nothing to add
        if not reached.all():
            x, g = x[:, reached], g[:, reached]
        return x.float() if x.is_floating_point() else x, g.float()

    def _context(self, kind: str, name: str) -> Any:
        """What an earlier pass knows that this kind needs, prepared once for each layer."""
        prepare = KINDS[kind].context
        if prepare is None or self.given is None:
            return None
        if (kind, name) not in self.contexts:
            self.contexts[kind, name] = prepare(*(self.given.mean(need, name) for need in KINDS[kind].needs))
        return self.contexts[kind, name]

    def result(self, origin: dict[str, Any]) -> Statistics:
        """The statistics of all processes together.

        Raises:
            LowRankError: there were no samples.
        """
        counts = summed(torch.tensor([self.samples, self.tokens, self.labels, self.seen]))
        loss = float(summed(torch.tensor(self.loss, dtype=torch.float64)))
        for kind, sums in self.sums.items():
            for name, total in sums.items():
                sums[name] = completed(kind, summed(total))
        shared = self.shared.result() if self.shared is not None else {}
        if counts[0] == 0:
            known = "none of them has a label" if counts[3] else "the data are empty"
            raise LowRankError(f"there are no samples to measure statistics on: {known}")
        weights = {name: digest(target.module) for name, target in self.targets.items()}
        samples, tokens, labels, _ = counts.tolist()
        regression = any(from_everyone(self.regression))  # a process without samples cannot know
        curvature = self.source.curvature(regression, loss / samples, labels / samples)
        return Statistics(self.sums | shared, samples, tokens, weights, origin, curvature, self.source.origin)

    def _backward(self, part: Part, losses_of: Losses, deliver: Deliver | None, read: Read | None = None) -> Tensor:
        """The losses of some samples, every layer's share of which is delivered; without `deliver` nothing counts."""
        self.recorder.begin_batch(len(part.numbers), deliver, read)
        self.finite.clear()
        with torch.enable_grad():
            losses = losses_of(self.model, part.batch, [everywhere(number) for number in part.numbers])
            if deliver is not None:
                check_finite({"the loss": torch.isfinite(losses)}, part.numbers)
            losses.sum().backward()
        self.recorder.end_batch()
        gradients = {f"the gradient of {name}": self.finite[name] for name in self.targets if name in self.finite}
        check_finite(gradients, part.numbers)
        return losses.detach()

    def _can_run_together(self, batch: Batch, samples: list[int]) -> bool | None:
        """Whether the losses of two of these together are those of each alone. None where there are no two."""
        if min(self._everyone(len(samples))) < 2:
            return None
        expected = self.probe([self.part(batch, [n]) for n in samples[:2]], self.source.alone)
        try:
            fast = self.probe([self.part(batch, samples[:2])], self.source.together)
        except Exception:  # what each sample alone did well: batches are not for this model
            agree = False
        else:
            allowed = AGREEMENT.get(self.model.dtype, HALF_PRECISION_AGREEMENT)
            agree = all(_difference(fast[name], expected[name]) <= allowed for name in self.targets)
        return all(self._everyone(agree))

    def _everyone(self, value: Any) -> list[Any]:
        """That of all processes, where they must go in step."""
        return from_everyone(value) if self.sharded else [value]

    def probe(self, parts: list[Part], losses_of: Losses) -> dict[str, Tensor]:
        """The row Fisher of every layer over a few samples, leaving the sums alone."""
        rows = self._empty(["fisher_rows"])["fisher_rows"]

        def deliver(name: str, x: Tensor, g: Tensor, largest: Tensor) -> None:
            accumulate("fisher_rows", rows[name], *self._reached(name, x, g, largest))

        for part in parts:
            self._backward(part, losses_of, deliver)
        return rows

    def _empty(self, kinds: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for name, target in self.targets.items():
            for kind in kinds:
                sums[kind][name] = torch.zeros(sum_shape(kind, target), device=self.devices[name])
        return sums


def everywhere(number: int) -> int:
    """The number, over all processes, of a sample that is the process's own of that number, if they were dealt out."""
    state = PartialState()
    return number * state.num_processes + state.process_index


def check_finite(finite: dict[str, Tensor], numbers: list[int]) -> None:
    """Raise for the first thing that is not finite, of samples with these numbers, after one synchronisation.

    Raises:
        LowRankError: the message names it, and the sample.
    """
    if not finite or torch.stack(list(finite.values())).all():
        return
    what, samples = next((what, samples) for what, samples in finite.items() if not samples.all())
    sample = numbers[int((~samples).nonzero()[0])]
    raise LowRankError(f"{what} is not finite for sample {sample} (counted from 0 in the order of the data)")


def not_separable(model: PreTrainedModel) -> LowRankError:
    """What is wrong where the samples of one batch could be told apart, and those of another cannot."""
    return LowRankError(
        f"{type(model).__name__}: the samples of a batch cannot be told apart, though those of an earlier one could; "
        "give batches of a single sample"
    )


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else float(a.norm())
