"""A model whose blocks are a chain, and samples → statistics, one block at a time: forward, head, and back again.

What every block gives is written beside the sums of the blocks that are done. On the way back a block is loaded, run
again from what the block before it gave, and dropped: neither the model nor its statistics are ever in memory whole.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Store, Work
from hf_lowrank.jobs.distributed import from_everyone, on_main, shared_errors
from hf_lowrank.jobs.interrupts import undivided
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.blocks import Chain, NotAChain, find_chain, loaded, outer_blocks, tensors_of
from hf_lowrank.model.predictions import unlabelled
from hf_lowrank.model.targets import Target, check_weights, find_targets
from hf_lowrank.model.weights import is_sharded, unwrapped
from hf_lowrank.statistics.batches import Batch, Marked, Marks, Split
from hf_lowrank.statistics.collect import settled
from hf_lowrank.statistics.container import Statistics
from hf_lowrank.statistics.hooks import Recorder, measuring
from hf_lowrank.statistics.kept_sums import Kept, KeptSums
from hf_lowrank.statistics.labels import Labels, Losses, labels_of
from hf_lowrank.statistics.losses import NotSeparable
from hf_lowrank.statistics.names import check_kinds, passes
from hf_lowrank.statistics.one_pass import COUNTED, Part, Pass, check_finite, everywhere, not_separable
from hf_lowrank.statistics.shared import InputSums


def statistics_by_blocks(
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
    labels: str | Labels = "data",
    marks: Marks | None = None,
    split: Split | None = None,
) -> Statistics:
    """As `compute_statistics`, in the memory of two blocks, their statistics and one batch, whatever the depth.

    The model may have its blocks on disk (see `blocks_on_disk`). What the blocks give lies on disk too: for all samples
    and blocks their hidden states, in the folder of `work`, or a temporary one. The sums stay there, and are read when
    they are used, so that they last as long as that folder.

    Args:
        model, loader, kinds, include, exclude, origin, progress, device, labels, marks, split: as there.
        work: where what is done is kept, block by block, and from where it goes on, to the same bits.

    Raises:
        NotAChain: the blocks of the model cannot be run one at a time, or a target is in none of them.
        LowRankError: as `compute_statistics`.
    """
    check_kinds(kinds)
    model = unwrapped(model)
    if is_sharded(model):
        raise NotAChain("it is sharded by FSDP2")
    targets = find_targets(model, include, exclude)
    check_weights(targets)
    source = labels_of(labels, (origin or {}).get("seed", 0))
    plan, kept = passes(kinds), Kept.of(work)
    samples = _Samples(model, targets, source, split, kept, [*loader])
    measured: Statistics | None = None
    for number, part in enumerate(plan, 1):
        if measured is not None and settled(measured):
            break
        title = "statistics, block by block" if len(plan) == 1 else f"statistics, block by block, pass {number}"
        run = _ThereAndBack(samples, part, measured, number, device, origin or {}, marks)
        with bar(title, len(samples.parts) * (2 * len(samples.chain.blocks) + 1), "steps", progress) as shown:
            result = run.measured(shown)
        measured = result if measured is None else measured.joined(result)
    assert measured is not None
    return measured


class _Samples:
    """This process's samples, as the model can be run on them, and the chain that its blocks are."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: dict[str, Target],
        source: Labels,
        split: Split | None,
        kept: Kept,
        batches: list[Batch],
    ) -> None:
        self.model, self.targets, self.source, self.kept = model, targets, source, kept
        blocks = tuple(f"{block}." for block in outer_blocks(model))
        outside = next((name for name in targets if not name.startswith(blocks)), None)
        if outside is not None:
            raise NotAChain(f"{outside} is in none of its blocks")
        planned = _Planned(self, split)
        place = planned.place
        batches = [send_to_device(dict(batch), place) for batch in batches]
        self.chain = self._chain(planned, batches)
        known = kept.own(1)
        if known.path("plan").is_file():
            planned.together = known.load("plan")[1]["together"]
        self.parts: list[Part] = []
        with shared_errors():
            for batch in batches:
                parts, size = planned.parts(batch)
                planned.seen += size
                self.parts += parts
        known.save("plan", ({}, {"together": planned.together}))
        self.together, self.seen, self.place = planned.together, planned.seen, planned.place

    def _chain(self, planned: "_Planned", batches: list[Batch]) -> Chain:
        """That of the model, by this process's first sample, or as another process found it."""
        found: Chain | None = None
        why = ""
        with shared_errors(), measuring(self.model, {}, planned.recorder):
            first = next((part for batch in batches for part in planned.alone(batch)), None)
            if first is not None:
                try:
                    found = find_chain(self.model, lambda: self.source.alone(self.model, first.batch, first.numbers))
                except NotAChain as reason:
                    why = str(reason)
        why = next((each for each in from_everyone(why) if each), "")
        if why:
            raise NotAChain(why)
        blocks = next((each for each in from_everyone(found and found.blocks) if each), None)
        if blocks is None:
            raise LowRankError("there are no samples to measure statistics on: none has a label, or the data are empty")
        return found or Chain(self.model, blocks, {})

    def layers(self, block: str) -> dict[str, Target]:
        """The targets in a block."""
        return {name: target for name, target in self.targets.items() if name.startswith(f"{block}.")}

    def sums_place(self, target: Target) -> torch.device:
        """Where sums are kept while a layer is in memory: beside it."""
        here = next(target.module.parameters()).device
        return self.place if here.type == "meta" else here

    def losses_of(self) -> Losses:
        """How the losses of a part are found."""
        return self.source.together if self.together else self.source.alone


class _Planned(Pass):
    """Which samples are run at once, decided as in a pass through a whole model, but block by block."""

    def __init__(self, samples: _Samples, split: Split | None) -> None:
        self.owner = samples
        super().__init__(samples.model, False, samples.targets, {}, (), None, split, samples.source)

    def alone(self, batch: Batch) -> Iterator[Part]:
        """The samples of a batch that have a loss, one by one."""
        if self.split is not None:
            yield from (Part(one, [0]) for one in self.split(batch) if self.source.known(self.model, one))
        else:
            yield from (self.part(batch, [n]) for n in self.source.known(self.model, batch))

    def probe(self, parts: list[Part], losses_of: Losses) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = {}
        still = measuring(self.model, {}, Recorder())
        with tempfile.TemporaryDirectory(prefix="hf_lowrank-") as folder, still:
            steps = _Steps(self.owner.model, self.owner.chain, parts, losses_of, Store(Path(folder)))
            steps.forward(lambda: None)
            for number in reversed(range(len(steps.chain.blocks) + 1)):
                layers = self.owner.layers(steps.chain.blocks[number]) if number < len(steps.chain.blocks) else {}
                devices = dict.fromkeys(layers, self.place)
                run = Pass(self.model, False, layers, devices, ["fisher_rows"], None, None, self.source)
                steps.back(number, run, lambda: None)
                rows |= run.sums["fisher_rows"]
        return rows


@dataclass
class _Steps:
    """Samples on their way through the blocks and back; what every block gives, and its gradient, is in `kept`.

    The model is to be in evaluation mode without parameter gradients, as within `measuring`.
    """

    model: PreTrainedModel
    chain: Chain
    parts: Sequence[Part]
    losses_of: Losses
    kept: Store

    def forward(self, shown: Any) -> None:
        """Run all samples through all blocks, but for what is kept already."""
        for number, block in enumerate(self.chain.blocks):
            left = [n for n in range(len(self.parts)) if not self.kept.path(f"out-{number}-{n}").is_file()]
            with loaded(self.model.get_submodule(block)):
                for n in left:
                    with undivided(), torch.no_grad():
                        self._save(f"out-{number}-{n}", tensors_of(self._run(number, n, self._given(number, n))))
            for _ in self.parts:
                shown()

    def back(self, number: int, run: Pass, shown: Any, count: Any = None) -> list[dict[str, Tensor]]:
        """Run all samples through a block, or the head if there is none of that number, and back.

        `run` adds up its layers' statistics, and `count` takes the losses of the head. The active tokens of its layers,
        by part.
        """
        active: list[dict[str, Tensor]] = []
        blocks = [self.model.get_submodule(block) for block in self.chain.blocks[number : number + 1]]
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(measuring(block, run.targets, run.recorder))
            stack.enter_context(loaded(*blocks))
            for n, part in enumerate(self.parts):
                with undivided():
                    losses = self._back(number, n, run)
                    if count is not None:
                        count(part, losses)
                    if run.shared is not None:
                        run.shared.end_batch()
                        active.append(run.shared.active)
                        run.shared.active = {}
                shown()
        run.recorder.begin_batch(0, None, None)  # so that nothing holds the pass, nor its sums, any more
        return active

    def _back(self, number: int, n: int, run: Pass) -> Tensor | None:
        part, losses = self.parts[n], None
        given = self._given(number, n)
        leaves = {block: tensors_of(output) for block, output in given.items()}
        for tensor in [tensor for tensors in leaves.values() for tensor in tensors]:
            tensor.requires_grad_(tensor.is_floating_point())
        run.recorder.begin_batch(len(part.numbers), run.deliver, run.read)
        run.finite.clear()
        with torch.enable_grad():
            if number == len(self.chain.blocks):
                losses = self._losses(part, number, given)
                check_finite({"the loss": torch.isfinite(losses)}, part.numbers)
                losses.sum().backward()
            else:
                output = tensors_of(self._run(number, n, given))
                gradients = self._gradients(number, n).items()
                reached = [(output[place], grad.to(output[place])) for place, grad in gradients]
                reached = [(tensor, grad) for tensor, grad in reached if tensor.requires_grad]
                if reached:
                    torch.autograd.backward(*zip(*reached, strict=True))  # type: ignore[arg-type]
        run.recorder.end_batch()
        finite = {f"the gradient of {name}": run.finite[name] for name in run.targets if name in run.finite}
        check_finite(finite, part.numbers)
        for block, tensors in leaves.items():
            grads = {str(place): t.grad for place, t in enumerate(tensors) if t.grad is not None}
            self.kept.save(f"grad-{self.chain.blocks.index(block)}-{n}-by-{number}", (grads, {}))
        return None if losses is None else losses.detach()

    def drop(self, number: int) -> None:
        """Let go of what a block gave, which nobody reads any more."""
        for path in [*self.kept.folder.glob(f"out-{number}-*"), *self.kept.folder.glob(f"grad-{number}-*")]:
            path.unlink()

    def _losses(self, part: Part, number: int, given: Mapping[str, Any]) -> Tensor:
        numbers = [everywhere(sample) for sample in part.numbers]
        try:
            return self.chain.run(lambda: self.losses_of(self.model, part.batch, numbers), number, given)
        except NotSeparable:
            raise not_separable(self.model) from None

    def _run(self, number: int, n: int, given: Mapping[str, Any]) -> Any:
        batch = self.parts[n].batch
        return self.chain.run(lambda: self.model(**unlabelled(self.model, batch)), number, given)

    def _given(self, number: int, n: int) -> dict[str, Any]:
        """What the blocks before one gave, of a part, by block."""
        device = _device(self.parts[n].batch)
        given = {}
        for block in self.chain.last_behind(number):
            tensors, _ = self.kept.load(f"out-{self.chain.blocks.index(block)}-{n}")
            ordered = [tensors[str(place)].to(device) for place in range(len(tensors))]
            given[block] = self.chain.forms[block].filled(ordered)
        return given

    def _gradients(self, number: int, n: int) -> dict[int, Tensor]:
        """The gradients by what a block gave, of a part, added up over all that read it."""
        total: dict[int, Tensor] = {}
        for reader in range(number + 1, len(self.chain.blocks) + 1):
            name = f"grad-{number}-{n}-by-{reader}"
            if self.kept.path(name).is_file():
                for place, grad in self.kept.load(name)[0].items():
                    total[int(place)] = total[int(place)] + grad if int(place) in total else grad
        return total

    def _save(self, name: str, tensors: list[Tensor]) -> None:
        distinct = {str(place): tensor.clone() for place, tensor in enumerate(tensors)}  # safetensors stores no views
        self.kept.save(name, (distinct, {}))


def _device(batch: Batch) -> torch.device:
    return next(value.device for value in batch.values() if isinstance(value, Tensor))


class _ThereAndBack:
    """One pass over the samples: forward through all blocks, and back, each block's sums being kept when it is done."""

    def __init__(
        self,
        samples: _Samples,
        kinds: Sequence[str],
        given: Statistics | None,
        number: int,
        device: torch.device | str | None,
        origin: dict[str, Any],
        marks: Marks | None,
    ) -> None:
        self.samples, self.kinds, self.given, self.device, self.origin = samples, kinds, given, device, origin
        self.marks, self.chain, self.kept = marks, samples.chain, samples.kept
        self.sums, self.own = samples.kept.sums(number), samples.kept.own(number)
        self.steps = _Steps(samples.model, samples.chain, samples.parts, samples.losses_of(), self.own)

    def measured(self, shown: Any) -> Statistics:
        """The statistics of all blocks, which lie on disk."""
        numbers = range(len(self.chain.blocks))
        finished = on_main(lambda: sorted(self.sums.names())) if self.kept.shared else []
        left = [number for number in reversed(numbers) if _done(number) not in finished]
        with measuring(self.samples.model, {}, Recorder()):
            if left:
                self._head(shown)
            for number in left:
                self._block(number, shown)
        if self.marks is not None:
            self._mark()
        return self._result()

    def _head(self, shown: Any) -> None:
        """Forward, and the gradients of the losses by what the last blocks gave."""
        with shared_errors():  # though this process may be done
            if self.own.path("head").is_file():
                return
            self.steps.forward(shown.update)
            run = self._pass({})
            self.steps.back(len(self.chain.blocks), run, shown.update, run.count)
            run.seen = self.samples.seen
            self.own.save("head", ({}, {name: getattr(run, name) for name in COUNTED}))

    def _block(self, number: int, shown: Any) -> None:
        """The sums of a block over all processes, kept."""
        layers = self.samples.layers(self.chain.blocks[number])
        run = self._pass(layers)
        if run.shared is None and self.marks is not None:
            run.shared = InputSums((), run.targets, run.devices)
        for name, value in self.own.load("head")[1].items():
            setattr(run, name, value)
        with shared_errors():
            active = self.steps.back(number, run, shown.update)
            self.own.save(f"active-{number}", _packed(active))
        with loaded(self.samples.model.get_submodule(self.chain.blocks[number])):
            found = run.result(self.origin)
        self._keep(number, found)
        self.steps.drop(number)

    def _pass(self, layers: dict[str, Target]) -> Pass:
        devices = {n: torch.device(self.device or self.samples.sums_place(target)) for n, target in layers.items()}
        model, source = self.samples.model, self.samples.source
        return Pass(model, False, layers, devices, self.kinds, self.given, None, source)

    def _keep(self, number: int, found: Statistics) -> None:
        first: dict[int, str] = {}
        entries: dict[str, dict[str, str]] = {}
        for kind, sums in found.sums.items():
            for name, total in sums.items():
                entry = first.setdefault(id(total), f"{kind}.{name}")
                entries.setdefault(kind, {})[name] = entry
                if entry == f"{kind}.{name}":
                    self.kept.save(self.sums, entry, {"sum": total})
        facts: dict[str, Any] = {"samples": found.samples, "tokens": found.tokens, "curvature": found.curvature}
        facts |= {"entries": entries, "weights": found.weights, "labels": found.labels}
        self.kept.save(self.sums, _done(number), {}, facts)

    def _result(self) -> Statistics:
        entries: dict[str, dict[str, str]] = {kind: {} for kind in self.kinds}
        weights: dict[str, str] = {}
        for number in range(len(self.chain.blocks)):
            facts = self.sums.load(_done(number))[1]
            weights |= facts["weights"]
            for kind, names in facts["entries"].items():
                entries[kind] |= names
        ordered = {kind: {name: names[name] for name in self.samples.targets} for kind, names in entries.items()}
        sums = {kind: KeptSums(self.kept, self.sums, names) for kind, names in ordered.items()}
        of: Any = (self.origin, facts["curvature"], facts["labels"])
        return Statistics(sums, facts["samples"], facts["tokens"], weights, *of)

    def _mark(self) -> None:
        """Take note of the samples and of what is active, for sequential factors."""
        assert self.marks is not None
        self.marks.clear()
        active: list[dict[str, Tensor]] = [{} for _ in self.samples.parts]
        for number in range(len(self.chain.blocks)):
            for n, found in enumerate(_unpacked(self.own.load(f"active-{number}"))):
                active[n] |= found
        self.marks.extend(Marked(part.batch, known) for part, known in zip(self.samples.parts, active, strict=True))
        self.marks.complete = self.marks.chained = True


def _done(number: int) -> str:
    return f"block-{number}"


def _packed(active: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Any]:
    """Active tokens by part and layer, those of layers that read the same input once: tensors, and who has which."""
    tensors: dict[str, Tensor] = {}
    who: list[dict[str, str]] = []
    for n, by_name in enumerate(active):
        first: dict[int, str] = {}
        who.append({name: first.setdefault(id(tensor), f"{n}.{name}") for name, tensor in by_name.items()})
        tensors |= {key: by_name[key.partition(".")[2]] for key in first.values()}
    return tensors, {"who": who}


def _unpacked(kept: tuple[dict[str, Tensor], Any]) -> list[dict[str, Tensor]]:
    tensors, facts = kept
    return [{name: tensors[key] for name, key in by_name.items()} for by_name in facts["who"]]
