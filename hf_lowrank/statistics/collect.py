"""One pass over the data: the model's own per-sample losses, backward, and every layer's statistics added up."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.distributed import Result, from_everyone, on_main, shared_errors, summed
from hf_lowrank.jobs.interrupts import Stopped, undivided
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import check_weights, find_targets
from hf_lowrank.model.weights import digest, is_sharded, sums_device, unwrapped
from hf_lowrank.nn.layers_lowrank import is_embedding
from hf_lowrank.statistics.checkpoints import Checkpoints
from hf_lowrank.statistics.container import Statistics
from hf_lowrank.statistics.hooks import Recorder, measuring
from hf_lowrank.statistics.kinds import KINDS, accumulate, completed, sum_shape
from hf_lowrank.statistics.kronecker import RISE, rise
from hf_lowrank.statistics.losses import (
    Batch,
    NotSeparable,
    SampleLosses,
    curvature_per_fisher,
    is_regression,
    label_count,
    own_loss,
    sample_losses,
)
from hf_lowrank.statistics.names import ALTERNATING, passes
from hf_lowrank.statistics.shared import InputSums

# A batch of two and the same samples alone must agree to this relative difference before batches are relied on.
AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_PRECISION_AGREEMENT = 0.2

# What a pass counts besides its sums.
COUNTED = ("samples", "tokens", "labels", "batches", "loss", "regression")


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
) -> Statistics:
    """Measure `kinds` of every targeted layer (see `find_targets`) over all samples of `loader`.

    One pass measures them all, apart from the few that others must precede (see `passes`): a second one. The nearest
    Kronecker product takes more, until it comes no nearer (see `RISE`).

    The unit is a sample's own task loss: its mean over its own labelled tokens, dropout off. Batches only save time:
    the first one is checked against its samples taken alone, and where a model mixes samples or has a loss of
    another form, every sample is run alone with the model's own loss.

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

    A model wrapped in DistributedDataParallel is taken out of it. One sharded by FSDP2 is measured as it is, all
    processes going step by step; it cannot be resumed.

    Raises:
        LowRankError: an unknown kind; no samples; no labels; a weight, loss or gradient that is not finite.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise LowRankError(f"unknown statistic {unknown[0]!r}; there are {', '.join(KINDS)}")
    model = unwrapped(model)
    if work is not None and is_sharded(model):
        raise LowRankError("statistics of a model sharded by FSDP2 cannot be checkpointed; call without `work`")
    targets = find_targets(model, include, exclude)
    check_weights(targets)
    _refuse_embeddings(targets, kinds)
    plan = passes(kinds)
    checkpoints = None if work is None else Checkpoints(work)
    measured, done = (None, 0) if checkpoints is None else checkpoints.finished()
    for number, part in list(enumerate(plan, 1))[done:]:
        if measured is not None and _settled(measured):
            break
        title = "statistics" if len(plan) == 1 else f"statistics, pass {number} of {_at_most(len(plan))}"
        run = _Pass(model, targets, part, measured, None if device is None else torch.device(device))
        together = nullcontext() if run.sharded else shared_errors()  # sharded models go step by step
        shown_by = bar(title, _length(loader), "samples", progress)
        with shown_by as shown, measuring(model, targets, run.recorder), together:
            _run(run, loader, shown, checkpoints)
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
        shown.update(run.samples)
    batches = lockstep(loader) if run.sharded else ((batch, True) for batch in loader)
    try:
        for batch, counts in islice(batches, run.batches, None):
            with undivided():
                run.add(batch, counts)
            shown.update(run.samples - shown.n)
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


def _refuse_embeddings(targets: dict[str, nn.Module], kinds: Sequence[str]) -> None:
    dense = [kind for kind in kinds if KINDS[kind].dense]
    embeddings = [name for name, module in targets.items() if is_embedding(module)]
    if dense and embeddings:
        raise LowRankError(f"{embeddings[0]}: {dense[0]} cannot be measured of an embedding; take another method")


class _Pass:
    """The state of one pass: the sums so far, and how samples are fed to the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: dict[str, nn.Module],
        kinds: Sequence[str],
        given: Statistics | None,
        device: torch.device | None,
    ) -> None:
        self.model, self.targets, self.given, self.device = model, targets, given, device
        self.kinds = [kind for kind in kinds if not KINDS[kind].of_input]
        of_input = [kind for kind in kinds if KINDS[kind].of_input]
        self.shared = InputSums(of_input, targets, device) if of_input else None
        self.contexts: dict[tuple[str, str], Any] = {}
        self.losses: SampleLosses | None = None  # decided on the first batch; own_loss means one sample at a time
        self.sums = self._empty(self.kinds)
        self.samples = self.tokens = self.labels = self.batches = 0
        self.loss, self.regression = 0.0, False
        self.probing = self.idle = False
        self.sharded = is_sharded(model)
        self.place = PartialState().device if model.device.type == "meta" else model.device  # offloaded: hooks move it
        self.finite: dict[str, Tensor] = {}
        self.recorder = Recorder(self.deliver, self.read)

    def add(self, batch: Batch, counts: bool = True) -> None:
        """Add the samples of one batch to the sums, or only run the model on them while other processes count."""
        batch = {key: value.to(self.place) if isinstance(value, Tensor) else value for key, value in batch.items()}
        if self.losses is None:
            self.losses = self._choose_losses(batch)
        parts = [batch] if self.losses is sample_losses else list(one_by_one(batch))
        steps = max(from_everyone(len(parts))) if self.sharded else len(parts)
        for step in range(steps):
            part = parts[min(step, len(parts) - 1)]
            self.idle = not counts or step >= len(parts)
            self._backward(part, self.losses, self.samples)
            if self.shared is not None:
                self.shared.end_batch()
            self.samples += 0 if self.idle else _size(part)
            self.labels += 0 if self.idle else label_count(self.model, part)
        self.batches += 1
        self.tokens += int(batch["attention_mask"].sum()) if counts and "attention_mask" in batch else 0

    def state(self) -> Result:
        """Everything that has been found out, between two batches."""
        tensors = {f"sum/{kind}/{name}": total for kind, sums in self.sums.items() for name, total in sums.items()}
        cells, members = self.shared.state() if self.shared is not None else ({}, [])
        together = None if self.losses is None else self.losses is sample_losses
        facts = {name: getattr(self, name) for name in COUNTED} | {"together": together}
        return tensors | {f"cell/{key}": total for key, total in cells.items()}, facts | {"members": members}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from a `state`."""
        for kind, sums in self.sums.items():
            for name, total in sums.items():
                total.copy_(tensors[f"sum/{kind}/{name}"])
        cells = {key.removeprefix("cell/"): total for key, total in tensors.items() if key.startswith("cell/")}
        if self.shared is not None:
            self.shared.restore(cells, facts["members"])
        for name in COUNTED:
            setattr(self, name, facts[name])
        if facts["together"] is not None:
            self.losses = sample_losses if facts["together"] else own_loss

    def read(self, key: Hashable, readers: tuple[str, ...], x: Tensor, largest: Tensor) -> None:
        """Add one input's share of a batch to what inputs alone decide (see `Recorder`)."""
        if self.shared is not None and not (self.idle or self.probing):
            self.shared.arrive(key, readers, x, largest)

    def deliver(self, name: str, x: Tensor, g: Tensor, largest: Tensor) -> None:
        """Add one layer's share of a batch (see `Recorder`)."""
        if self.idle:
            return
        self.finite[name] = torch.isfinite(largest).all(dim=1)
        reached = (largest != 0).any(dim=0)  # elsewhere, as behind a last layer's attention, there is nothing to add
        if not reached.all():
            x, g = x[:, reached], g[:, reached]
        x, g = x.float() if x.is_floating_point() else x, g.float()
        for kind in self.kinds:
            accumulate(kind, self.sums[kind][name], x, g, self._context(kind, name))

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
        counts = summed(torch.tensor([self.samples, self.tokens, self.labels]))
        loss = float(summed(torch.tensor(self.loss, dtype=torch.float64)))
        for kind, sums in self.sums.items():
            for name, total in sums.items():
                sums[name] = completed(kind, summed(total))
        shared = self.shared.result() if self.shared is not None else {}
        if counts[0] == 0:
            raise LowRankError("there are no samples to measure statistics on")
        weights = {name: digest(module) for name, module in self.targets.items()}
        samples, tokens, labels = counts.tolist()
        curvature = curvature_per_fisher(self.regression, loss / samples, labels / samples)
        return Statistics(self.sums | shared, samples, tokens, weights, origin, curvature)

    def _backward(self, batch: Batch, losses_of: SampleLosses, first: int) -> None:
        """Deliver every layer's share of a batch, whose first sample has the number `first`."""
        self.recorder.begin_batch(_size(batch))
        self.finite.clear()
        with torch.enable_grad():
            losses = losses_of(self.model, batch)
            _check_finite({"the loss": torch.isfinite(losses)}, first)
            losses.sum().backward()
        if not (self.idle or self.probing):
            self.loss += float(losses.detach().double().sum())
            self.regression = is_regression(self.model, batch)
        self.recorder.end_batch()
        gradients = {f"the gradient of {name}": self.finite[name] for name in self.targets if name in self.finite}
        _check_finite(gradients, first)

    def _choose_losses(self, batch: Batch) -> SampleLosses:
        """`sample_losses` if two samples together give what the model's own loss gives alone, else `own_loss`."""
        alone = list(one_by_one(batch))[:2]
        if min(self._everyone(len(alone))) < 2:
            return own_loss
        together = {key: _slice(value, slice(0, 2), _size(batch)) for key, value in batch.items()}
        allowed = AGREEMENT.get(self.model.dtype, HALF_PRECISION_AGREEMENT)
        try:
            expected, fast = self._probe(alone, own_loss), self._probe([together], sample_losses)
        except NotSeparable:
            return own_loss
        agree = all(_difference(fast[name], expected[name]) <= allowed for name in self.targets)
        return sample_losses if all(self._everyone(agree)) else own_loss

    def _everyone(self, value: Any) -> list[Any]:
        """That of all processes, where they must go in step."""
        return from_everyone(value) if self.sharded else [value]

    def _probe(self, parts: list[Batch], losses_of: SampleLosses) -> dict[str, Tensor]:
        """The row Fisher of every layer over a few samples, leaving the sums alone."""
        kept = self.kinds, self.sums
        self.kinds, self.sums, self.probing = ["fisher_rows"], self._empty(["fisher_rows"]), True
        try:
            for number, part in enumerate(parts):
                self._backward(part, losses_of, number)
            return self.sums["fisher_rows"]
        finally:
            (self.kinds, self.sums), self.probing = kept, False

    def _empty(self, kinds: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for name, module in self.targets.items():
            for kind in kinds:
                shape = sum_shape(kind, module)
                sums[kind][name] = torch.zeros(shape, dtype=torch.float32, device=self.device or sums_device(module))
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


def _check_finite(finite: dict[str, Tensor], first: int) -> None:
    """Raise for the first thing [samples] that is not finite, after one synchronisation with the device."""
    if not finite or torch.stack(list(finite.values())).all():
        return
    what, samples = next((what, samples) for what, samples in finite.items() if not samples.all())
    sample = first + int((~samples).nonzero()[0])
    raise LowRankError(f"{what} is not finite for sample {sample} (counted from 0 in the order of the data)")


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else float(a.norm())


def _size(batch: Batch) -> int:
    """The number of samples: the length of the labels, or of the first tensor."""
    tensor = batch.get("labels", next(value for value in batch.values() if isinstance(value, Tensor)))
    return len(tensor)


def one_by_one(batch: Batch) -> Iterator[Batch]:
    """The samples of a batch, as batches of one."""
    size = _size(batch)
    for n in range(size):
        yield {key: _slice(value, slice(n, n + 1), size) for key, value in batch.items()}


def _slice(value: Any, part: slice, size: int) -> Any:
    several = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
    return value[part] if several and len(value) == size else value


def _length(loader: Any) -> int | None:
    """The number of samples where a loader knows it, for the progress bar."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None
