"""The one place that edits a model: its targeted linears become low-rank factors, one at a time."""

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.allocation import saves_parameters, uniform_ranks
from hf_lowrank.errors import LowRankError
from hf_lowrank.modeling_lowrank import LowRankLinear, dense_weight, replace_module, to_low_rank_class
from hf_lowrank.progress import bar
from hf_lowrank.report import CompressionReport, LayerReport
from hf_lowrank.solvers import Method, get_method
from hf_lowrank.statistics import Statistics
from hf_lowrank.targets import check_weights, find_targets, weight_shape


@dataclass(frozen=True)
class CompressionConfig:
    """How to compress: a method (see `METHODS`), the share of the ranks to keep, and which layers.

    `rank_ratio` is rank / min(in, out), in (0, 1]. `include` and `exclude` are name patterns (see `find_targets`).

    Raises:
        LowRankError: the method is unknown or the ratio is out of range.
    """

    method: str = "tfwsvd"
    rank_ratio: float = 0.33
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        get_method(self.method)
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
    ranks = uniform_ranks(targets, config.rank_ratio)
    before, started = model.num_parameters(), time.perf_counter()
    model = to_low_rank_class(model)
    layers = []
    with bar(f"factorizing by {method.name}", len(targets), "layers", progress) as shown:
        for name, linear in targets.items():
            layers.append(_factorize_layer(model, name, linear, ranks[name], method, statistics))
            shown.update()
    described = (
        {"samples": statistics.samples, "origin": statistics.origin} if statistics is not None and method.needs else {}
    )
    report = CompressionReport(
        asdict(config), before, model.num_parameters(), time.perf_counter() - started, tuple(layers), described
    )
    return model, report


@torch.no_grad()
def _factorize_layer(
    model: PreTrainedModel, name: str, linear: nn.Module, rank: int, method: Method, statistics: Statistics | None
) -> LayerReport:
    started = time.perf_counter()
    out_features, in_features = weight_shape(linear)
    parameters = out_features * in_features
    if not saves_parameters(out_features, in_features, rank):
        return LayerReport(
            name, out_features, in_features, None, parameters, parameters, note=f"rank {rank} saves nothing"
        )
    weight = dense_weight(linear).detach().float()
    objective = method.objective(
        {kind: statistics.mean(kind, name).to(weight.device) for kind in method.needs} if statistics else {}
    )
    factors = objective.factorize(weight, rank)
    balanced = factors.balanced()
    low_rank = LowRankLinear.from_factors(linear, balanced.up, balanced.down)
    delta = weight - low_rank.up.weight.float() @ low_rank.down.weight.float()  # the factors as they are stored
    replace_module(model, name, low_rank)
    return LayerReport(
        name,
        out_features,
        in_features,
        rank,
        parameters,
        rank * (out_features + in_features),
        relative_error=_root_ratio(delta.square().sum(), weight.square().sum()),
        weighted_error=_root_ratio(objective.error(delta), objective.error(weight)),
        seconds=time.perf_counter() - started,
        trace=factors.trace,
    )


def _root_ratio(error: Tensor, whole: Tensor) -> float:
    return float((error / whole).sqrt()) if whole > 0 else 0.0
