"""The one place that edits a model: its targeted linears become low-rank factors, one at a time."""

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.allocation import allocate, check_allocation, saves_parameters, uniform_ranks
from hf_lowrank.errors import LowRankError
from hf_lowrank.modeling_lowrank import LowRankLinear, dense_weight, replace_module, to_low_rank_class
from hf_lowrank.progress import bar
from hf_lowrank.report import CompressionReport, LayerReport
from hf_lowrank.solvers import Method, Objective, get_method
from hf_lowrank.statistics import Statistics
from hf_lowrank.targets import check_weights, find_targets, weight_shape


@dataclass(frozen=True)
class CompressionConfig:
    """How to compress: a method (see `METHODS`), the share of the ranks to keep, and which layers.

    `rank_ratio` is rank / min(in, out), in (0, 1]. `allocation` is how ranks are spread over layers (`ALLOCATIONS`), at
    the same number of parameters; the method's own by default. `include` and `exclude` are name patterns (see
    `find_targets`).

    Raises:
        LowRankError: the method or the allocation is unknown, or the ratio is out of range.
    """

    method: str = "kfac"
    rank_ratio: float = 0.33
    allocation: str | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        method = get_method(self.method)
        if self.allocation is None:
            object.__setattr__(self, "allocation", method.allocation)
        check_allocation(self.allocation or "")
        uniform_ranks({}, self.rank_ratio)


def compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    statistics: Statistics | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Factorize the targeted linears of `model` in place, and return it as a low-rank model, with a report.

    Peak memory is the model, the statistics and one layer's workspace. All input is checked before anything is edited;
    should it be interrupted all the same, the model is whole, with some of its layers still dense.

    Args:
        model: any transformers model; nothing but its targeted linears changes.
        statistics: what the method needs (see `Method.needs`), measured on this very model.

    Raises:
        LowRankError: nothing matches a pattern; a weight is not finite; statistics are missing, of another model or of
            other shapes.
    """
    method = get_method(config.method)
    targets = find_targets(model, config.include, config.exclude)
    check_weights(targets)
    if method.needs:
        if statistics is None:
            raise LowRankError(
                f"the method {method.name!r} needs statistics ({', '.join(method.needs)}); see compute_statistics"
            )
        statistics.check(targets, method.needs)
    before, started = model.num_parameters(), time.perf_counter()
    job = _Job(model, targets, method, statistics)
    ranks = allocate(targets, config.rank_ratio, config.allocation or "uniform", job.spectrum)
    try:
        model = to_low_rank_class(model)
    except ValueError as error:  # of a class that could not be found again when the saved model is loaded
        raise LowRankError(str(error)) from error
    layers = []
    with bar(f"factorizing by {method.name}", len(ranks), "layers", progress) as shown:
        for name, rank in ranks.items():
            layers.append(job.factorize(name, rank))
            shown.update()
    described = {}
    if statistics is not None and method.needs:
        described = {"samples": statistics.samples, "origin": statistics.origin}
    seconds = time.perf_counter() - started
    report = CompressionReport(asdict(config), before, model.num_parameters(), seconds, tuple(layers), described)
    return model, report


@dataclass(frozen=True)
class _Job:
    """One layer after the other: its weight and statistics → its objective → its spectrum or factors."""

    model: PreTrainedModel
    targets: dict[str, nn.Module]
    method: Method
    statistics: Statistics | None

    def spectrum(self, name: str) -> Tensor:
        """What each direction of a layer costs when discarded, largest first."""
        weight = _weight(self.targets[name])
        return self._objective(name, weight.device).spectrum(weight)

    @torch.no_grad()
    def factorize(self, name: str, rank: int) -> LayerReport:
        """Replace a layer by its factors, unless they save nothing, and let go of it."""
        started = time.perf_counter()
        linear = self.targets.pop(name)
        shape = weight_shape(linear)
        parameters = shape[0] * shape[1]
        if not saves_parameters(shape, rank):
            return LayerReport(name, *shape, None, parameters, parameters, note=f"rank {rank} saves nothing")
        weight = _weight(linear)
        objective = self._objective(name, weight.device)
        factors = objective.factorize(weight, rank)
        balanced = factors.balanced()
        low_rank = LowRankLinear.from_factors(linear, balanced.up, balanced.down)
        delta = weight - low_rank.up.weight.float() @ low_rank.down.weight.float()  # the factors as they are stored
        replace_module(self.model, name, low_rank)
        return LayerReport(
            name,
            *shape,
            rank,
            parameters,
            rank * sum(shape),
            relative_error=_root_ratio(delta.square().sum(), weight.square().sum()),
            weighted_error=_root_ratio(objective.error(delta), objective.error(weight)),
            seconds=time.perf_counter() - started,
            trace=factors.trace,
        )

    def _objective(self, name: str, device: torch.device) -> Objective:
        if self.statistics is None:
            return self.method.objective({})
        return self.method.objective({kind: self.statistics.mean(kind, name).to(device) for kind in self.method.needs})


def _weight(linear: nn.Module) -> Tensor:
    return dense_weight(linear).detach().float()


def _root_ratio(error: Tensor, whole: Tensor) -> float:
    return float((error / whole).sqrt()) if whole > 0 else 0.0
