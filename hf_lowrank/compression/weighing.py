"""The layers of a model → what their directions are worth, for the ranks, and these directions again, for factors.

Every layer is decomposed once, by one of the processes. What factors need of that is kept: in the folder of unfinished
work where there is one, from which any process reads it, else in the main memory of the process that found it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hf_lowrank.allocation.costs import saves_parameters
from hf_lowrank.allocation.spread import Spread
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.jobs.checkpoint import Store, Work
from hf_lowrank.jobs.distributed import Result, divided, estimated_cost, from_everyone
from hf_lowrank.jobs.progress import bar
from hf_lowrank.solvers.decomposition import Decomposition


@dataclass
class Weighing:
    """The layers of a `solver`, decomposed when the first spectrum is asked for.

    Args:
        solver: of all layers.
        largest: the greatest rank that each may get, by name.
        work: where what is found is kept.
        keep: whether decompositions are kept: until they are asked for, "always", or "never", being of no use where
            factors are those of other inputs.
        progress: whether a bar is shown.
    """

    solver: LayerSolver
    largest: Mapping[str, int]
    work: Work | None = None
    keep: Literal["once", "always", "never"] = "once"
    progress: bool = True
    _spectra: dict[str, list[float]] = field(default_factory=dict)
    _held: dict[str, Decomposition] = field(default_factory=dict)

    def spectrum(self, name: str) -> list[float]:
        """What discarding each direction of a layer adds to the expected loss. All processes ask for the first one."""
        if not self._spectra:
            costs = {name: estimated_cost(target.shape) for name, target in self.solver.targets.items()}
            kept = self.work.store("spectra") if self.work is not None else None
            with bar("weighing", len(costs), "layers", self.progress) as shown:
                for layer, (tensors, _) in divided(costs, self._weighed, kept):
                    self._spectra[layer] = tensors["spectrum"].tolist()
                    shown.update()
        return self._spectra[name]

    def decomposition(self, name: str) -> Decomposition | None:
        """The one that was found for a layer, where this process can have it."""
        store = self._store()
        if store is not None and store.path(name).is_file():
            return Decomposition(**store.load(name)[0])
        return self._held.get(name) if self.keep == "always" else self._held.pop(name, None)

    def holders(self) -> dict[str, int]:
        """The process in whose memory each decomposition is, by name. All processes must ask."""
        return {name: process for process, names in enumerate(from_everyone([*self._held])) for name in names}

    def _weighed(self, name: str) -> Result:
        spectrum, found = self.solver.weigh(name, 0 if self.keep == "never" else self.largest[name])
        if found is not None:
            store = self._store()
            if store is None:
                self._held[name] = found.to("cpu")
            else:
                store.save(name, (vars(found), {}))
        return {"spectrum": spectrum}, {}

    def _store(self) -> Store | None:
        return self.work.store("decompositions") if self.work is not None else None


def weighing_for(
    solver: LayerSolver,
    config: CompressionConfig,
    work: Work | None = None,
    progress: bool = True,
    keep: Literal["once", "always", "never"] = "once",
) -> Weighing:
    """Of the layers of a solver, with the ranks that a config allows."""
    shapes = {name: target.shape for name, target in solver.targets.items()}
    largest = {name: largest_rank(shape, config.spread, config.form) for name, shape in shapes.items()}
    return Weighing(solver, largest, work, keep, progress)


def largest_rank(shape: tuple[int, int], spread: Spread, form: str) -> int:
    """The greatest rank by which a layer [out, in] can become smaller, or its least one."""
    ranks = spread.ranks(shape)
    saving = [rank for rank in ranks if form != "factors" or saves_parameters(shape, rank)]
    return max(saving, default=min(ranks, default=1))
