"""One pass over the data: the model's own per-sample losses, backward, and every layer's statistics added up."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.distributed import Result, from_everyone, on_main, shared_errors, summed
from hf_lowrank.jobs.interrupts import Stopped, undivided
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import Target, check_weights, find_targets
from hf_lowrank.model.weights import digest, is_sharded, sums_device, unwrapped
from hf_lowrank.statistics.batches import Batch, Marked, Marks, Split, batch_size, selected
from hf_lowrank.statistics.checkpoints import Checkpoints
from hf_lowrank.statistics.container import Statistics
from hf_lowrank.statistics.hooks import Deliver, Read, Recorder, measuring
from hf_lowrank.statistics.kinds import KINDS, accumulate, completed, sum_shape
from hf_lowrank.statistics.kronecker import RISE, rise
from hf_lowrank.statistics.labels import Labels, Losses, labels_of
from hf_lowrank.statistics.losses import NotSeparable, is_regression
from hf_lowrank.statistics.names import ALTERNATING, check_kinds, passes
from hf_lowrank.statistics.shared import InputSums

# A batch of two and the same samples alone must agree to this relative difference before batches are relied on.
AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_PRECISION_AGREEMENT = 0.2

# What a pass counts besides its sums.
COUNTED = ("seen", "samples", "tokens", "labels", "batches", "loss", "regression")


def compute_fisher(
    model: PreTrainedModel,
    loader: Iterable[Batch],
    form: Literal["element", "row"] = "element",
    **options: Any,
) -> Statistics:
    """The exact empirical Fisher information of every targeted weight, E_n[(∂loss_n/∂W)²], with the labels of the data.

    Hsu et al. (2022), section 4.

    Args:
        model: as in `compute_statistics`, and so is `loader`.
        loader: batches with labels.
        form: "element" [out, in] of each layer, or "row", its sum over outputs [in], which is all that FWSVD needs and
            forms no gradients.
        options: the others of `compute_statistics`.

    Raises:
        LowRankError: as `compute_statistics`.
    """
    return compute_statistics(model, loader, ["fisher" if form == "element" else "fisher_rows"], **options)


def compute_statistics(
    model: PreTrainedModel,
    loader: Iterable[Batch],
    kinds: Sequence[str],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    origin: dict[str, Any] | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    work: Work | None = None,
    split: Split | None = None,
    labels: str | Labels = "data",
    marks: Marks | None = None,
) -> Statistics:
    """Measure `kinds` of every targeted layer (see `find_targets`) over all samples of `loader`.

    One pass measures them all, apart from the few that others must precede (see `passes`): a second one. The nearest
    Kronecker product takes more, until it comes no nearer (see `RISE`).

    The unit is a sample's own task loss: its mean over its own labelled tokens, dropout off. Batches only save time:
    the first two samples of one are checked against the same taken alone, and where a model mixes samples, has a loss
    of another form or takes no batches, every sample is run alone with the model's own loss. A sample without any label
    (all are -100) adds nothing and is not counted, wherever it stands.

    Args:
        model: any transformers model; it is as it was afterwards.
        loader: batches as keyword arguments of the model, with labels; their size may vary. With several processes
            each one gives its own share, and the sums are added over processes at the end.
        kinds: names in `KINDS`, such as `CompressionConfig.needs` lists.
        include: name patterns of layers (see `find_targets`); None for the linears inside the blocks.
        exclude: name patterns of layers to leave out.
        origin: plain facts kept with the result (model, task, data, seed).
        progress: whether a bar is shown.
        device: where the sums are kept; by default beside their layer. "cpu" spares an accelerator's memory.
        work: where sums are checkpointed, and from where they go on, to the same bits (see `Work.open`).
        split: what makes of a batch one batch for each of its samples, which are then run alone. For models whose
            inputs are not one entry for each sample, such as the patches of several images in a row; batches of single
            samples need none.
        labels: "data" for those of the batches, or "model" for all that the model itself expects: then batches need
            none, and any output can be measured (see `ModelLabels`, which may be given itself). Under several processes
            a process's samples are taken to be every so many of all, as `calibration_loader` deals them: with others
            the signs are as random, but not those of one process.
        marks: takes note of the samples and their active tokens, with which sequential factors go on (`compress`);
            complete unless the last pass went on from a checkpoint.

    A model wrapped in DistributedDataParallel is taken out of it. One sharded by FSDP2 is measured as it is, all
    processes going step by step; it cannot be resumed.

    Raises:
        LowRankError: an unknown kind; no samples; no labels; a weight, loss or gradient that is not finite; a batch
            that cannot be split into samples.
    """
    check_kinds(kinds)
    model = unwrapped(model)
    sharded = is_sharded(model)
    if work is not None and sharded:
        raise LowRankError("statistics of a model sharded by FSDP2 cannot be checkpointed; call without `work`")
    targets = find_targets(model, include, exclude)
    check_weights(targets)
    devices = {name: torch.device(device or sums_device(target.module)) for name, target in targets.items()}
    _refuse_embeddings(targets, kinds)
    plan, source = passes(kinds), labels_of(labels, (origin or {}).get("seed", 0))
    checkpoints = None if work is None else Checkpoints(work, source.origin)
    measured, done = (None, 0) if checkpoints is None else checkpoints.finished()
    for number, part in list(enumerate(plan, 1))[done:]:
        if measured is not None and _settled(measured):
            break
        title = "statistics" if len(plan) == 1 else f"statistics, pass {number} of {_at_most(len(plan))}"
        run = _Pass(model, sharded, targets, devices, part, measured, split, source)
        if marks is not None:
            marks.clear()
            run.marks = marks
        together = nullcontext() if run.sharded else shared_errors()  # sharded models go step by step
        shown_by = bar(title, _length(loader), "samples", progress)
        with shown_by as shown, measuring(model, targets, run.recorder), together:
            _run(run, loader, shown, checkpoints)
        if marks is not None:
            marks.complete = all(from_everyone(run.shared is not None and not run.restored))
        result = run.result(origin or {})
        measured = result if measured is None else measured.joined(result)
        if checkpoints is not None:
            checkpoints.finish(measured)
    assert measured is not None
    return measured


def _run(run: "_Pass", loader: Iterable[Batch], shown: Any, checkpoints: Checkpoints | None) -> None:
    """Take a pass through what is left of the data, with a checkpoint now and then, and when stopped."""
    if checkpoints is not None and (state := checkpoints.load()) is not None:
        run.restore(*state)
        shown.update(run.seen)
    batches = lockstep(loader) if run.sharded else ((batch, True) for batch in loader)
    try:
        for batch, counts in islice(batches, run.batches, None):
            with undivided():
                run.add(batch, counts)
            shown.update(run.seen - shown.n)
            if checkpoints is not None and checkpoints.due():
                checkpoints.save(run.state())
        if checkpoints is not None and PartialState().num_processes > 1:
            checkpoints.save(run.state())  # others may take long, or never come
    except Stopped:
        if checkpoints is not None:
            checkpoints.save(run.state())
        raise


def _settled(measured: Statistics) -> bool:
    """Whether the factors that take turns have come to rest, by the main process's figures."""
    if not all(kind in measured.sums for kind in ALTERNATING):
        return False
    factors = [measured.sums[kind] for kind in ALTERNATING]
    return on_main(lambda: all(rise(*(by_name[name] for by_name in factors)) <= RISE for name in factors[0]))


def _at_most(count: int) -> str:
    """A number of passes, of which more than two are only made while they help."""
    return str(count) if count <= 2 else f"at most {count}"


def _refuse_embeddings(targets: dict[str, Target], kinds: Sequence[str]) -> None:
    dense = [kind for kind in kinds if KINDS[kind].dense]
    embeddings = [name for name, target in targets.items() if target.kind == "embedding"]
    if dense and embeddings:
        raise LowRankError(f"{embeddings[0]}: {dense[0]} cannot be measured of an embedding; take another method")


class _Part(NamedTuple):
    """What is run at once: a batch, and the numbers of its samples in the order of the data."""

    batch: Batch
    numbers: list[int]


class _Pass:
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
        """Add the samples of one batch to the sums, or only run the model on them while other processes count."""
        batch = send_to_device(dict(batch), self.place)
        parts, size = self._parts(batch)
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
                self._count(part, losses)
        self.batches += 1
        self.seen += size if counts else 0

    def _parts(self, batch: Batch) -> tuple[list["_Part"], int]:
        """What of a batch is run at once, all of it or single samples, without those that have no label; its size."""
        if self.split is not None:
            alone = [_Part(sample, [self.seen + n]) for n, sample in enumerate(self.split(batch))]
            return [part for part in alone if self.source.known(self.model, part.batch)], len(alone)
        known = self.source.known(self.model, batch)
        if self.together is None:
            self.together = self._can_run_together(batch, known)
        together = [known] if known else []
        groups = together if self.together else [[n] for n in known]
        return [self._part(batch, numbers) for numbers in groups], batch_size(batch)

    def _part(self, batch: Batch, samples: list[int]) -> "_Part":
        return _Part(selected(batch, samples), [self.seen + n for n in samples])

    def _any_sample(self, batch: Batch) -> "_Part":
        """Something to run the model on, to no end but that other processes do."""
        return _Part(next(iter(self.split(batch))), [0]) if self.split is not None else self._part(batch, [0])

    def _count(self, part: "_Part", losses: Tensor) -> None:
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
        """The statistics of all processes together."""
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

    def _backward(self, part: "_Part", losses_of: Losses, deliver: Deliver | None, read: Read | None = None) -> Tensor:
        """The losses of some samples, every layer's share of which is delivered; without `deliver` nothing counts."""
        self.recorder.begin_batch(len(part.numbers), deliver, read)
        self.finite.clear()
        with torch.enable_grad():
            losses = losses_of(self.model, part.batch, [_everywhere(number) for number in part.numbers])
            if deliver is not None:
                _check_finite({"the loss": torch.isfinite(losses)}, part.numbers)
            losses.sum().backward()
        self.recorder.end_batch()
        gradients = {f"the gradient of {name}": self.finite[name] for name in self.targets if name in self.finite}
        _check_finite(gradients, part.numbers)
        return losses.detach()

    def _can_run_together(self, batch: Batch, samples: list[int]) -> bool | None:
        """Whether the losses of two of these together are those of each alone. None where there are no two."""
        if min(self._everyone(len(samples))) < 2:
            return None
        expected = self._probe([self._part(batch, [n]) for n in samples[:2]], self.source.alone)
        try:
            fast = self._probe([self._part(batch, samples[:2])], self.source.together)
        except Exception:  # what each sample alone did well: batches are not for this model
            agree = False
        else:
            allowed = AGREEMENT.get(self.model.dtype, HALF_PRECISION_AGREEMENT)
            agree = all(_difference(fast[name], expected[name]) <= allowed for name in self.targets)
        return all(self._everyone(agree))

    def _everyone(self, value: Any) -> list[Any]:
        """That of all processes, where they must go in step."""
        return from_everyone(value) if self.sharded else [value]

    def _probe(self, parts: list["_Part"], losses_of: Losses) -> dict[str, Tensor]:
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


def lockstep(loader: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """(batch, whether it counts), as often on every process as on the one with the most batches.

    A process that has no more goes on with its last batch, or with another's first if it never had one.
    """
    batches, last = iter(loader), None
    while True:
        batch = next(batches, None)
        everyone = from_everyone(batch if last is None else batch is not None)
        if not any(each is not None and each is not False for each in everyone):
            return
        if batch is None and last is None:
            last = next(each for each in everyone if isinstance(each, dict))
        last = last if batch is None else batch
        assert last is not None
        yield last, batch is not None


def _everywhere(number: int) -> int:
    """The number, over all processes, of a sample that is the process's own of that number, if they were dealt out."""
    state = PartialState()
    return number * state.num_processes + state.process_index


def _check_finite(finite: dict[str, Tensor], numbers: list[int]) -> None:
    """Raise for the first thing that is not finite, of samples with these numbers, after one synchronisation."""
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


def _length(loader: Any) -> int | None:
    """The number of samples where a loader knows it, for the progress bar."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None
