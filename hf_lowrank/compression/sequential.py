"""A model and its samples → for each layer in the order of the forward pass, what factorizes it behind those before."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from transformers import PreTrainedModel

from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Store, Work
from hf_lowrank.jobs.distributed import on_main
from hf_lowrank.model.targets import Target, tied_targets
from hf_lowrank.solvers import get_method
from hf_lowrank.statistics.batches import Batch, Marks
from hf_lowrank.statistics.labels import Labels
from hf_lowrank.statistics.prefix import Prefix, marked_batches


def check_sequential(model: PreTrainedModel, targets: Mapping[str, Target], config: CompressionConfig) -> None:
    """Raise for layers whose inputs in two models cannot be compared, where they should be.

    Raises:
        LowRankError: the message names the layer.
    """
    if not config.sequential:
        return
    for name, target in targets.items():
        if why := _why_not(model, target):
            raise LowRankError(f"{name} {why}: exclude it, or compress without `sequential`")


def _why_not(model: PreTrainedModel, target: Target) -> str:
    """Why a layer's inputs in two models cannot be compared; "" if they can."""
    if target.kind == "expert":
        return "sees other tokens in each model, as they are routed"
    tied = tied_targets(model, target)
    return f"reads tokens, and {tied[0].name}, which is tied to it, hidden states" if tied else ""


def prefix_of(
    model: PreTrainedModel,
    targets: Mapping[str, Target],
    config: CompressionConfig,
    batches: Iterable[Batch] | Marks | None,
    labels: str | Labels,
    progress: bool,
    work: Work | None = None,
) -> Prefix | None:
    """The samples, to be run behind the layers that are solved; None where layers are factorized in one shot.

    Embeddings read the same tokens in every model, and come before all steps.

    Args:
        targets: the layers that get factors.
        batches: the samples of the statistics, or what measuring those marked of them.
        labels: whose labels those are by.
        work: where what is kept of the samples may be.

    Raises:
        LowRankError: the config asks for sequential factors, and a layer is used several times.
    """
    later = {name: target for name, target in targets.items() if target.kind != "embedding"}
    if not later or not is_wanted(model, targets, config, batches is not None):
        return None
    marked = batches if isinstance(batches, Marks) else marked_batches(model, later, batches or (), labels, progress)
    try:
        return Prefix.of(model, later, marked, work)
    except LowRankError:  # of a layer that is not used once
        if config.sequential:
            raise
        return None


def is_wanted(model: PreTrainedModel, targets: Mapping[str, Target], config: CompressionConfig, given: bool) -> bool:
    """Whether factors are to be sequential, where every layer is used once and samples are `given`."""
    if config.sequential is not None:
        return config.sequential
    able = not any(_why_not(model, target) for target in targets.values())
    return get_method(config.method).sequential and able and given


def behind_each_other(
    prefix: Prefix, solver: LayerSolver, names: Iterable[str], kept: Store | None
) -> Iterator[tuple[LayerSolver, Sequence[str]]]:
    """Of the layers called `names` the solver of the next ones, which read one input, and their names.

    Whoever asks for the next has put factors in the place of these. What is `kept` is not measured for.
    """
    behind = {name for step in prefix.order.steps for name in step.names}
    first = [name for name in names if name not in behind]
    dense = {name: solver.targets[name].module for name in first}
    yield solver, first
    prefix.dense |= dense
    for step in prefix.order.steps:
        dense = {name: solver.targets[name].module for name in step.names}
        done = on_main(lambda: kept.names() if kept is not None else set())
        solved = done >= set(step.names)
        yield solver if solved else solver.behind(step.names, prefix.measure(step)), step.names
        prefix.dense |= dense
