"""A model and its samples → for each layer in the order of the forward pass, what factorizes it behind those before."""

from collections.abc import Iterator, Mapping, Sequence

from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Store
from hf_lowrank.jobs.distributed import on_main
from hf_lowrank.model.targets import Target
from hf_lowrank.statistics.prefix import Prefix


def check_sequential(targets: Mapping[str, Target], config: CompressionConfig) -> None:
    """Raise for layers whose inputs in two models cannot be compared, where they should be.

    Raises:
        LowRankError: the message names the layer.
    """
    if not config.sequential:
        return
    for name, target in targets.items():
        if target.kind in ("embedding", "expert"):
            what = (
                "reads tokens" if target.kind == "embedding" else "sees other tokens in each model, as they are routed"
            )
            raise LowRankError(f"{name} {what}: exclude it, or compress without `sequential`")


def behind_each_other(
    prefix: Prefix, solver: LayerSolver, kept: Store | None
) -> Iterator[tuple[LayerSolver, Sequence[str]]]:
    """The solver of the next layers, which read one input, and their names.

    Whoever asks for the next has put factors in the place of these. What is `kept` is not measured for.
    """
    for step in prefix.order.steps:
        dense = {name: solver.targets[name].module for name in step.names}
        done = on_main(lambda: kept.names() if kept is not None else set())
        solved = done >= set(step.names)
        yield solver if solved else solver.behind(step.names, prefix.measure(step)), step.names
        prefix.dense |= dense
