"""The smallest model that is still good enough, by measuring candidates: model + what is measured + limit → model."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.allocation import BUDGETS, AlreadySmaller, ImpossibleBudget, Profile
from hf_lowrank.compression.compress import checked_targets, compress, layer_solver, present_share
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.report import CompressionReport
from hf_lowrank.compression.sequential import is_wanted
from hf_lowrank.compression.weighing import Weighing, weighing_for
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import agreed
from hf_lowrank.jobs.progress import bar
from hf_lowrank.statistics import Statistics
from hf_lowrank.statistics.batches import Batch, Marks
from hf_lowrank.statistics.labels import Labels

# The search begins with the largest budget below what the model has, and ends when the budget is known, to this share
# of the targeted parameters.
RESOLUTION = 0.01


@dataclass(frozen=True)
class Found:
    """The smallest model found, its report, what was measured of it, and every (keep, measured) that was tried."""

    model: PreTrainedModel
    report: CompressionReport
    measured: float
    tried: tuple[tuple[float, float], ...]


def search_smallest(
    model: PreTrainedModel,
    config: CompressionConfig,
    statistics: Statistics | None,
    measure: Callable[[PreTrainedModel], float],
    accept: Callable[[float], bool],
    profile: Profile | None = None,
    progress: bool = True,
    batches: Iterable[Batch] | Marks | None = None,
    labels: str | Labels | None = None,
) -> Found:
    """The model of fewest parameters whose measurement is accepted, by bisection of the budget `keep`.

    `config` says everything but the budget. `model` itself is left as it is: each candidate is a copy. Measurements
    need not fall evenly with the size; what is returned was measured and accepted. The largest candidate is measured
    first, and the search ends where it is not accepted. `batches` and `labels` are as in `compress`.

    Raises:
        LowRankError: nothing smaller than the model is accepted; the message says what came nearest.
    """
    low, high, best = 0.0, present_share(model, config, statistics), None
    keep = high - RESOLUTION
    solver = layer_solver(checked_targets(model, config), config, statistics)
    one_shot = not is_wanted(model, solver.targets, config, batches is not None)
    weighing = weighing_for(solver, config, progress=False, keep="always" if one_shot else "never")
    tried: list[tuple[float, float]] = []
    with bar("searching", None, "models", progress) as shown:
        while high - low > RESOLUTION * (1 + 1e-9):
            try:
                found = _measured(model, config, statistics, keep, profile, measure, batches, labels, weighing)
            except AlreadySmaller:  # by its form alone
                high, keep = keep, (low + keep) / 2
                continue
            if found is not None:
                tried.append((keep, found.measured))
                shown.set_postfix_str(f"keep {keep:.3f}: {found.measured:.4g}")
                shown.update()
            if found is not None and accept(found.measured):
                high, best = keep, found
            else:
                low = keep
            keep = (low + high) / 2
    if best is None:
        raise LowRankError(
            "no smaller model is good enough; "
            + (f"the largest, keep {tried[0][0]:.3f}, measured {tried[0][1]:.4g}" if tried else "none is possible")
        )
    return replace(best, tried=tuple(tried))


def _measured(
    model: PreTrainedModel,
    config: CompressionConfig,
    statistics: Statistics | None,
    keep: float,
    profile: Profile | None,
    measure: Callable[[PreTrainedModel], float],
    batches: Iterable[Batch] | Marks | None,
    labels: str | Labels | None,
    weighing: Weighing,
) -> Found | None:
    """A copy of the model at a budget, and its measurement; None where the budget is below the least possible."""
    budget = {kind: keep if kind == "keep" else None for kind in BUDGETS}
    settings = replace(config, **budget)  # type: ignore[arg-type]
    try:
        rest: Any = {"batches": batches, "labels": labels, "weighing": weighing}
        candidate = compress(copy.deepcopy(model), settings, statistics, False, profile, **rest)
    except AlreadySmaller:
        raise
    except ImpossibleBudget:
        return None
    return Found(*candidate, agreed(measure(candidate[0])), ())
