"""The one place that edits a model: its targeted linears become low-rank factors, one at a time."""

import math
import time
from dataclasses import asdict, dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.allocation import BUDGETS, Budget, Profile, Spread, allocate, get_allocation, parse_count
from hf_lowrank.errors import LowRankError
from hf_lowrank.layers import LayerSolver
from hf_lowrank.modeling_lowrank import replace_module, to_low_rank_class
from hf_lowrank.progress import bar
from hf_lowrank.report import CompressionReport
from hf_lowrank.solvers import METHODS, get_method, get_optimizer
from hf_lowrank.statistics import Statistics
from hf_lowrank.targets import check_weights, find_targets

DEFAULT_RANK_RATIO = 0.33


@dataclass(frozen=True)
class CompressionConfig:
    """How to compress: a method (see `METHODS`), one budget, how it is spread over layers, and which layers.

    The budget is one of `rank_ratio`, `keep`, `keep_model`, `params`, `flops` and `latency` (see `BUDGETS`); without
    any, a rank ratio of 0.33. `allocation` is one of `ALLOCATIONS`, by default the method's own; `align`, `floor` and
    `cap` bound the ranks (see `Spread`). `optimizer` is one of `OPTIMIZERS`, for methods that iterate. `include` and
    `exclude` are name patterns (see `find_targets`).

    Raises:
        LowRankError: an unknown name, a value out of range, or several budgets.
    """

    method: str = "kfac"
    rank_ratio: float | None = None
    allocation: str | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    keep: float | None = None
    keep_model: float | None = None
    params: float | str | None = None
    flops: float | str | None = None
    latency: float | None = None
    align: int = 1
    floor: float = 0.0
    cap: float | None = None
    optimizer: str | None = None

    def __post_init__(self) -> None:
        method = get_method(self.method)
        if self.allocation is None:
            object.__setattr__(self, "allocation", method.allocation)
        if all(getattr(self, kind) is None for kind in BUDGETS):
            object.__setattr__(self, "rank_ratio", DEFAULT_RANK_RATIO)
        if self.optimizer is not None:
            get_optimizer(self.optimizer)
            if not method.iterates:
                iterating = ", ".join(name for name, each in METHODS.items() if each.iterates)
                raise LowRankError(f"{self.method} has a closed form; an optimizer is for {iterating}")
        _ = self.budget, self.spread  # raise where they are out of range

    @property
    def budget(self) -> Budget:
        """The budget that was given."""
        given = {kind: value for kind in BUDGETS if (value := getattr(self, kind)) is not None}
        if len(given) > 1:
            raise LowRankError(f"give one budget, not {len(given)}: {', '.join(given)}")
        ((kind, value),) = given.items()
        return Budget(kind, parse_count(value))

    @property
    def spread(self) -> Spread:
        """How it is spread over layers."""
        return Spread(self.allocation or "uniform", self.align, self.floor, math.inf if self.cap is None else self.cap)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that compressing takes: the method's, and those that make its layers comparable."""
        return get_method(self.method).needs_for(get_allocation(self.allocation or "uniform").losses == "spectrum")


def compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    statistics: Statistics | None = None,
    progress: bool = True,
    profile: Profile | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Factorize the targeted linears of `model` in place, and return it as a low-rank model, with a report.

    Peak memory is the model, the statistics and one layer's workspace. All input is checked before anything is edited;
    should it be interrupted all the same, the model is whole, with some of its layers still dense.

    Args:
        model: any transformers model; nothing but its targeted linears changes.
        statistics: what is needed (see `CompressionConfig.needs`), measured on this very model.
        profile: the measured losses of single layers, for the allocation "knapsack" (see `profile_losses`).

    Raises:
        LowRankError: nothing matches a pattern; a weight is not finite; statistics are missing, of another model or of
            other shapes; the budget cannot be met.
    """
    targets = find_targets(model, config.include, config.exclude)
    check_weights(targets)
    solver = layer_solver(targets, config, statistics)
    before, started = model.num_parameters(), time.perf_counter()
    ranks = allocate(targets, before, config.budget, config.spread, solver.spectrum, profile)
    try:
        model = to_low_rank_class(model)
    except ValueError as error:  # of a class that could not be found again when the saved model is loaded
        raise LowRankError(str(error)) from error
    layers = []
    with bar(f"factorizing by {config.method}", len(ranks), "layers", progress) as shown:
        for name, rank in ranks.items():
            if rank is None:
                layer = solver.dense(name)
            else:
                low_rank, layer = solver.low_rank(name, rank)
                replace_module(model, name, low_rank)
            layers.append(layer)
            del targets[name]  # a dense layer that was replaced can be freed
            shown.update()
    described = {}
    if statistics is not None and config.needs:
        described = {"samples": statistics.samples, "origin": statistics.origin}
    seconds = time.perf_counter() - started
    report = CompressionReport(asdict(config), before, model.num_parameters(), seconds, tuple(layers), described)
    model.compression_report = report  # type: ignore[assignment]  # for the card, should the model be pushed
    return model, report


def layer_solver(
    targets: dict[str, nn.Module], config: CompressionConfig, statistics: Statistics | None
) -> LayerSolver:
    """What factorizes the targets one at a time, once the statistics are known to be theirs.

    Raises:
        LowRankError: statistics are missing, or of another model.
    """
    if config.needs:
        if statistics is None:
            raise LowRankError(
                f"the method {config.method!r} needs statistics ({', '.join(config.needs)}); see compute_statistics"
            )
        statistics.check(targets, config.needs)
    return LayerSolver(targets, get_method(config.method), statistics, config.optimizer)
