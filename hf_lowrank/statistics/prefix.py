"""A model, compressed up to some layer, and its dense layers → what the next layers read in it and in the dense one.

Both are run on the same samples, the dense layers put back for one of the runs, and every run ends where the input is
reached. Blocks that are behind it are not computed again: what the last of them gave is kept for each batch.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.distributed import from_everyone, shared_errors, summed
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.blocks import KeptOutputs, Reached, dropped, giving, is_on_disk, list_of, loaded, outer_blocks
from hf_lowrank.model.predictions import unlabelled
from hf_lowrank.model.targets import Target, weight_shape
from hf_lowrank.model.weights import sums_device
from hf_lowrank.nn.editing_lowrank import replace_by_identity
from hf_lowrank.statistics.batches import Batch, Marked, Marks
from hf_lowrank.statistics.hooks import measuring
from hf_lowrank.statistics.kinds import add_activation_moment, completed
from hf_lowrank.statistics.labels import Labels, labels_of
from hf_lowrank.statistics.one_pass import Pass
from hf_lowrank.statistics.patches import geometry, patches, reading
from hf_lowrank.statistics.shared import InputSums

Side = Literal["dense", "low rank"]
SIDES: tuple[Side, Side] = ("dense", "low rank")


@dataclass(frozen=True)
class Step:
    """Layers that read one input, the block that they are in, None outside of all blocks, and their `Target.kind`."""

    names: tuple[str, ...]
    block: str | None
    kind: str


@dataclass(frozen=True)
class Order:
    """The layers in the order in which a forward pass reaches them, and so the blocks."""

    steps: tuple[Step, ...]
    blocks: tuple[str, ...]


def marked_batches(
    model: PreTrainedModel,
    targets: dict[str, Target],
    loader: Iterable[Batch],
    labels: str | Labels = "data",
    progress: bool = True,
) -> Marks:
    """This process's samples, as the model can be run on them, with the tokens that their losses depend on.

    One pass forward and back.

    Raises:
        LowRankError: as `compute_statistics`.
    """
    devices = {name: sums_device(target.module) for name, target in targets.items()}
    run = Pass(model, False, targets, devices, (), None, None, labels_of(labels))
    run.shared, run.marks = InputSums((), targets, devices), Marks()
    shown_by = bar("active tokens", None, "samples", progress)
    with shown_by as shown, measuring(model, targets, run.recorder), shared_errors():
        for batch in loader:
            run.add(batch)
            shown.update(run.seen - shown.n)
    return run.marks


def forward_order(model: PreTrainedModel, targets: Mapping[str, Target], marked: Sequence[Marked]) -> Order:
    """In which order this process's first samples, or another's, reach the targets.

    Raises:
        LowRankError: on all processes, if a target is used several times or not at all.
    """
    found = None
    with shared_errors():
        if marked:
            found = _observed(model, targets, marked[0].batch)
    order = next((each for each in from_everyone(found) if each is not None), None)
    if order is None:
        raise LowRankError("there are no samples to run the model on")
    return order


def _observed(model: PreTrainedModel, targets: Mapping[str, Target], batch: Batch) -> Order:
    entries = outer_blocks(model)
    calls: Counter[str] = Counter()
    blocks: dict[str, None] = {}
    numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of inputs that are still there
    counted = count()
    readers: dict[Hashable, list[str]] = {}

    def reached(target: Target, args: tuple[Any, ...]) -> None:
        x = args[0]
        calls[target.name] += 1
        number = numbers.setdefault(x, next(counted))
        cut = geometry(reading(target.module)) if target.kind == "convolution" else None
        readers.setdefault((_block_of(target.name, entries), number, x._version, cut), []).append(target.name)

    def entered(name: str, args: tuple[Any, ...]) -> None:
        blocks.setdefault(name)

    with ExitStack() as hooks:
        for target in targets.values():
            hooks.enter_context(_before(target.module, partial(reached, target)))
        for name in entries:
            hooks.enter_context(_before(model.get_submodule(name), partial(entered, name)))
        _forward(model, batch)
    for name in targets:
        if calls[name] != 1:
            times = f"{calls[name]} times in" if calls[name] else "not at all by"
            raise LowRankError(
                f"{name} is used {times} a forward pass, and sequential factors need layers that are used once: "
                "compress without `sequential`, or exclude it"
            )
    steps = (Step(tuple(names), key[0], targets[names[0]].kind) for key, names in readers.items())  # type: ignore[index]
    return Order(tuple(steps), tuple(blocks))


def _block_of(name: str, entries: Iterable[str]) -> str | None:
    return next((entry for entry in entries if name.startswith(f"{entry}.")), None)


@dataclass
class Prefix:
    """The samples, run through the model up to a layer, twice: with all layers dense, and with those that are solved.

    `dense` holds the dense layers in whose place the model has others; what is of no use any more is let go.
    """

    model: PreTrainedModel
    marked: Sequence[Marked]
    order: Order
    dense: dict[str, nn.Module] = field(default_factory=dict)
    chained: bool = False  # whether what a block gives decides all that comes after it
    behind: dict[str, str] = field(default_factory=dict)  # the list of blocks → the last one whose output is kept
    given: MutableMapping[Any, Any] = field(default_factory=dict)  # (…, batch, list of blocks) → that output

    @classmethod
    def of(
        cls, model: PreTrainedModel, targets: Mapping[str, Target], marked: Sequence[Marked], work: Work | None = None
    ) -> "Prefix":
        """That of no layer, the model being dense.

        What the blocks of a model on disk give is there too, where there is `work` and they are known to be a chain.

        Raises:
            LowRankError: as `forward_order`.
        """
        prefix = cls(model, marked, forward_order(model, targets, marked))
        known = isinstance(marked, Marks) and marked.chained
        if known and work is not None and is_on_disk(model):
            prefix.given = KeptOutputs(work.store(f"behind-{PartialState().process_index}"))
        with prefix._evaluating():
            prefix.chained = known or (bool(marked) and prefix._is_chain())
        return prefix

    def _is_chain(self) -> bool:
        """Whether blocks need not be computed again, seen from the first batch: if they are not, all stays the same."""
        first = {step.block: step for step in reversed(self.order.steps)}
        chain = Prefix(self.model, self.marked[:1], self.order, chained=True)
        expected = {block: chain._run("dense", 0, step, None) for block, step in first.items()}
        for block in reversed(first):
            ahead = chain._block_before(first[block])
            try:
                chain._run("dense", 0, first[block], ahead)
                if ahead is not None:
                    chain._move(ahead)
                if not torch.equal(chain._run("dense", 0, first[block], None), expected[block]):
                    return False
            except Exception:  # what the model makes of outputs that it does not expect
                return False
        return True

    def measure(self, step: Step) -> dict[str, Tensor]:
        """Sums over the active tokens of all processes, x being read in the dense model, x′ in this one.

        "activation_moment" Σ x′ x′ᵀ [in, in], "activation_mean" Σ x′ [in], "drift" Σ (x − x′) x′ᵀ [in, in],
        "mean_drift" Σ (x − x′) [in], "active_tokens" their number [].
        """
        module = self.model.get_submodule(step.names[0])
        size, device = weight_shape(module)[1], sums_device(module)
        shapes: dict[str, tuple[int, ...]] = {"activation_moment": (size, size), "drift": (size, size)}
        shapes |= {"activation_mean": (size,), "mean_drift": (size,), "active_tokens": ()}
        sums = {kind: torch.zeros(shape, device=device) for kind, shape in shapes.items()}
        ahead = self._block_before(step)
        with self._evaluating(), loaded(*self._near(step, ahead)):
            for n, marked in enumerate(self.marked):
                active = self._active(step, marked)
                x, y = (self._read(side, n, step, ahead) for side in SIDES)
                _add(sums, *(_rows(step, module, each, active) for each in (x, y)))
        if ahead is not None:
            self._move(ahead)
        total = {kind: summed(each) for kind, each in sums.items()}
        return total | {"activation_moment": completed("activation_moment", total["activation_moment"])}

    def _active(self, step: Step, marked: Marked) -> Tensor:
        """[batch, tokens]; layers that read the same input have the same."""
        known = [marked.active[name] for name in step.names if name in marked.active]
        return known[0] if known else torch.zeros(1, 1, dtype=torch.bool)

    def _near(self, step: Step, ahead: str | None) -> list[nn.Module]:
        """The blocks that are run up to a step, on both sides."""
        blocks = [block for block in (ahead, step.block) if block is not None]
        dense = [module for name, module in self.dense.items() if _block_of(name, blocks)]
        return [*map(self.model.get_submodule, blocks), *dense]

    def _block_before(self, step: Step) -> str | None:
        """The block that a pass leaves just before that of a step, if its output is to be kept and is not yet."""
        if not self.chained:
            return None
        if step.block is None:
            before = self.order.blocks[-1:] if self.order.blocks else ()
        else:
            before = self.order.blocks[: self.order.blocks.index(step.block)][-1:]
        return next((block for block in before if self.behind.get(list_of(block)) != block), None)

    def _read(self, side: Side, n: int, step: Step, ahead: str | None) -> Tensor:
        """What the layers of a step read, on a side, of batch n. The output of the block `ahead` is kept."""
        with self._layers(side):
            return self._run(side, n, step, ahead)

    @torch.no_grad()
    def _run(self, side: Side, n: int, step: Step, ahead: str | None) -> Tensor:
        seen: list[Tensor] = []

        def reached(args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise Reached

        def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given.append(output)

        given: list[Any] = []
        with ExitStack() as stack:
            layer = self.model.get_submodule(step.names[0])
            stack.enter_context(_before(layer, reached))
            if ahead is not None:
                stack.callback(self.model.get_submodule(ahead).register_forward_hook(left).remove)
            stack.enter_context(self._replayed(side, n))
            with suppress(Reached):
                _forward(self.model, self.marked[n].batch)
        dropped(self.model)
        if ahead is not None:
            self.given[side, n, list_of(ahead)] = given[0]
        return seen[0]

    def _move(self, ahead: str) -> None:
        """Everything up to the block `ahead` is behind from now on."""
        self.behind[list_of(ahead)] = ahead
        passed = self.order.blocks[: self.order.blocks.index(ahead) + 1]
        for name in [name for name in self.dense if _block_of(name, passed)]:
            del self.dense[name]

    @contextmanager
    def _replayed(self, side: Side, n: int) -> Iterator[None]:
        """Within the block, the blocks that are behind give at once what the last of their list had given."""
        with ExitStack() as stack:
            for block in self.order.blocks:
                last = self.behind.get(list_of(block))
                if last is not None and self.order.blocks.index(block) <= self.order.blocks.index(last):
                    output = self.given[side, n, list_of(block)]
                    stack.enter_context(giving(self.model.get_submodule(block), output))
            yield

    @contextmanager
    def _layers(self, side: Side) -> Iterator[None]:
        """Within the block the model has the layers of a side."""
        swaps = {self.model.get_submodule(name): dense for name, dense in self.dense.items()} if side == "dense" else {}
        try:
            replace_by_identity(self.model, swaps)
            yield
        finally:
            replace_by_identity(self.model, {dense: low_rank for low_rank, dense in swaps.items()})

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training


@contextmanager
def _before(module: nn.Module, call: Callable[[tuple[Any, ...]], Any]) -> Iterator[None]:
    """Within the block, `call` is called with what the module is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        call(args)

    with module.register_forward_pre_hook(hook):
        yield


@torch.no_grad()
def _forward(model: nn.Module, batch: Batch) -> None:
    model(**unlabelled(model, batch))  # which need not be known


def _rows(step: Step, module: nn.Module, x: Tensor, active: Tensor) -> Tensor:
    """The active rows [rows, in] of what a layer of a step reads."""
    if step.kind == "convolution":
        x, _ = patches(reading(module), x, x.new_zeros(len(x), 1, 1))
    rows = x.reshape(-1, x.shape[-1]).float()
    return rows.index_select(0, active.to(x.device).flatten().nonzero()[:, 0])


def _add(sums: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
    place = sums["drift"].device
    x, y = x.to(place), y.to(place)
    drift = x - y
    add_activation_moment(sums["activation_moment"], y[None], torch.ones(1, len(y), device=place))
    sums["activation_mean"] += y.sum(dim=0)
    sums["drift"].addmm_(drift.T, y)
    sums["mean_drift"] += drift.sum(dim=0)
    sums["active_tokens"] += len(y)
