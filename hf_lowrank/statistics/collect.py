"""Passes over the data, as many as the kinds of statistics take, each resumed where it was left → the statistics."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.distributed import from_everyone, on_main, shared_errors
from hf_lowrank.jobs.interrupts import Stopped, undivided
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import Target, check_weights, find_targets
from hf_lowrank.model.weights import is_sharded, sums_device, unwrapped
from hf_lowrank.statistics.batches import Batch, Marks, Split
from hf_lowrank.statistics.checkpoints import Checkpoints
from hf_lowrank.statistics.container import Statistics
from hf_lowrank.statistics.hooks import measuring
from hf_lowrank.statistics.kinds import KINDS
from hf_lowrank.statistics.kronecker import RISE, rise
from hf_lowrank.statistics.labels import Labels, labels_of
from hf_lowrank.statistics.names import ALTERNATING, check_kinds, passes
from hf_lowrank.statistics.one_pass import Pass


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
        if measured is not None and settled(measured):
            break
        title = "statistics" if len(plan) == 1 else f"statistics, pass {number} of {_at_most(len(plan))}"
        run = Pass(model, sharded, targets, devices, part, measured, split, source)
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


def _run(run: Pass, loader: Iterable[Batch], shown: Any, checkpoints: Checkpoints | None) -> None:
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


def settled(measured: Statistics) -> bool:
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


def _length(loader: Any) -> int | None:
    """The number of samples where a loader knows it, for the progress bar."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None
