"""One pass over the data: the model's own per-sample losses, backward, and every layer's statistics added up."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.modeling_lowrank import dense_weight
from hf_lowrank.progress import bar
from hf_lowrank.statistics.container import Statistics, digest
from hf_lowrank.statistics.hooks import Recorder, measuring
from hf_lowrank.statistics.kinds import KINDS, accumulate, active_tokens, passes
from hf_lowrank.statistics.losses import Batch, NotSeparable, SampleLosses, own_loss, sample_losses
from hf_lowrank.statistics.shared import InputSums
from hf_lowrank.targets import check_weights, find_targets

# A batch of two and the same samples alone must agree to this relative difference before batches are relied on.
AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_PRECISION_AGREEMENT = 0.2


def compute_fisher(
    model: PreTrainedModel,
    loader: Iterable[Batch],
    form: Literal["element", "row"] = "element",
    **options: Any,
) -> Statistics:
    """The exact empirical Fisher information of every targeted weight, E_n[(∂loss_n/∂W)²], with the labels of the data.

    `form="row"` sums it over outputs, which is all that FWSVD needs, without forming the gradients. Hsu et al. (2022),
    section 4; the options are those of `compute_statistics`.
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
) -> Statistics:
    """Measure `kinds` of every targeted layer (see `find_targets`) over all samples of `loader`.

    One pass measures them all, apart from the few that others must precede (see `passes`): a second one.

    The unit is a sample's own task loss: its mean over its own labelled tokens, dropout off. Batches only save time:
    the first one is checked against its samples taken alone, and where a model mixes samples or has a loss of
    another form, every sample is run alone with the model's own loss. The model is as it was afterwards.

    Args:
        loader: batches as keyword arguments of the model, with labels; their size may vary. With several processes
            each one gives its own share, and the sums are added over processes at the end.
        origin: plain facts kept with the result (model, task, data, seed).
        device: where the sums are kept; by default beside their layer. "cpu" spares an accelerator's memory.

    Raises:
        LowRankError: an unknown kind; no samples; no labels; a weight, loss or gradient that is not finite.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise LowRankError(f"unknown statistic {unknown[0]!r}; there are {', '.join(KINDS)}")
    targets = find_targets(model, include, exclude)
    check_weights(targets)
    plan = passes(kinds)
    measured = None
    for number, part in enumerate(plan, 1):
        title = "statistics" if len(plan) == 1 else f"statistics, pass {number} of {len(plan)}"
        run = _Pass(model, targets, part, measured, None if device is None else torch.device(device))
        with bar(title, _length(loader), "samples", progress) as shown, measuring(model, targets, run.recorder):
            for batch in loader:
                run.add(batch)
                shown.update(run.samples - shown.n)
        result = run.result(origin or {})
        measured = result if measured is None else measured.joined(result)
    assert measured is not None
    return measured


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
        self.samples = self.tokens = 0
        self.probing = False
        self.finite: dict[str, Tensor] = {}
        self.recorder = Recorder(self.deliver)

    def add(self, batch: Batch) -> None:
        """Add the samples of one batch to the sums."""
        batch = {
            key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        if self.losses is None:
            self.losses = self._choose_losses(batch)
        parts = [batch] if self.losses is sample_losses else list(_one_by_one(batch))
        for part in parts:
            self._backward(part, self.losses, self.samples)
            if self.shared is not None:
                self.shared.end_batch()
            self.samples += _size(part)
        self.tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else 0

    def deliver(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add one layer's share of a batch: x [batch, tokens, in] and g [batch, tokens, out]."""
        self.finite[name] = torch.isfinite(g).flatten(1).all(dim=1)
        x, g = x.float(), g.float()
        for kind in self.kinds:
            accumulate(kind, self.sums[kind][name], x, g, self._context(kind, name))
        if self.shared is not None and not self.probing:
            self.shared.arrive(name, x, active_tokens(g), self.recorder.readers(name))

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
        counts = torch.tensor([self.samples, self.tokens], device=self.model.device)
        if PartialState().num_processes > 1:
            counts = reduce(counts, "sum")
            self.sums = reduce(self.sums, "sum")
        shared = self.shared.result() if self.shared is not None else {}
        if counts[0] == 0:
            raise LowRankError("there are no samples to measure statistics on")
        weights = {name: digest(module) for name, module in self.targets.items()}
        return Statistics(self.sums | shared, int(counts[0]), int(counts[1]), weights, origin)

    def _backward(self, batch: Batch, losses_of: SampleLosses, first: int) -> None:
        """Deliver every layer's share of a batch, whose first sample has the number `first`."""
        self.recorder.begin_batch(_size(batch))
        self.finite.clear()
        with torch.enable_grad():
            losses = losses_of(self.model, batch)
            _check_finite({"the loss": torch.isfinite(losses)}, first)
            losses.sum().backward()
        self.recorder.end_batch()
        gradients = {f"the gradient of {name}": self.finite[name] for name in self.targets if name in self.finite}
        _check_finite(gradients, first)

    def _choose_losses(self, batch: Batch) -> SampleLosses:
        """`sample_losses` if two samples together give what the model's own loss gives alone, else `own_loss`."""
        alone = list(_one_by_one(batch))[:2]
        if len(alone) < 2:
            return own_loss
        together = {key: _slice(value, slice(0, 2), _size(batch)) for key, value in batch.items()}
        allowed = AGREEMENT.get(self.model.dtype, HALF_PRECISION_AGREEMENT)
        try:
            expected, fast = self._probe(alone, own_loss), self._probe([together], sample_losses)
        except NotSeparable:
            return own_loss
        agree = all(_difference(fast[name], expected[name]) <= allowed for name in self.targets)
        return sample_losses if agree else own_loss

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
            weight = dense_weight(module)
            for kind in kinds:
                shape = KINDS[kind].shape(*weight.shape)
                sums[kind][name] = torch.zeros(shape, dtype=torch.float32, device=self.device or weight.device)
        return sums


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


def _one_by_one(batch: Batch) -> Iterator[Batch]:
    size = _size(batch)
    for n in range(size):
        yield {key: _slice(value, slice(n, n + 1), size) for key, value in batch.items()}


def _slice(value: Any, part: slice, size: int) -> Any:
    return value[part] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size else value


def _length(loader: Any) -> int | None:
    """The number of samples where a loader knows it, for the progress bar."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None
