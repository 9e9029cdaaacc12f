"""The one place that edits a model: its targeted linears become low-rank factors, one at a time."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.allocation import Profile, Ranks, allocate, check_budget
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.directions import PARTS, Directions, KeptDirections
from hf_lowrank.compression.forms import converted
from hf_lowrank.compression.latency import latency_for
from hf_lowrank.compression.report import CompressionReport, LayerReport
from hf_lowrank.compression.sequential import behind_each_other, check_sequential, is_wanted, prefix_of
from hf_lowrank.compression.solution import LayerSolver, kept_report
from hf_lowrank.compression.stored import check_bytes, choose_stored
from hf_lowrank.compression.uses import layers_for
from hf_lowrank.compression.weighing import Weighing, weighing_for
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.distributed import Result, agreed, divided, estimated_cost
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.blocks import is_on_disk
from hf_lowrank.model.targets import Target, check_weights, dense_parameters, factorized_layers, find_targets
from hf_lowrank.model.weights import is_sharded, placed_like, stored_parts, unwrapped
from hf_lowrank.nn.editing_lowrank import replace_module, restack_experts, submodule
from hf_lowrank.nn.layers_lowrank import LowRankLinear
from hf_lowrank.nn.modeling_lowrank import to_low_rank_class
from hf_lowrank.solvers import get_method
from hf_lowrank.statistics import Statistics
from hf_lowrank.statistics.batches import Batch, Marks
from hf_lowrank.statistics.labels import Labels
from hf_lowrank.statistics.prefix import Prefix


def compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    statistics: Statistics | None = None,
    progress: bool = True,
    profile: Profile | None = None,
    work: Work | None = None,
    batches: Iterable[Batch] | Marks | None = None,
    labels: str | Labels | None = None,
    weighing: Weighing | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Factorize the targeted linears of `model` in place, and return it as a low-rank model, with a report.

    Peak memory is the model, the statistics and one layer's workspace. Every layer is decomposed once, for its rank and
    its factors; what is kept in between, at most the weights in float32, is in memory too without `work`. All input is
    checked before anything is edited; should it be interrupted all the same, the model is whole, with some of its
    layers still dense.

    A model that was compressed before is compressed further: the factors of a layer are multiplied out, one layer at a
    time, and factorized again at a smaller rank, or stay as they are. Budgets and the report count against the dense
    model that it was; errors and the expected loss are those of this step. All layers come out in `config.form`, apart
    from those that stay as they are and would become larger by it.

    Args:
        model: any transformers model; nothing but its targeted linears changes.
        config: how to compress: a method, a budget, how it is spread, and which layers.
        statistics: what is needed (see `CompressionConfig.needs`), measured on this very model.
        progress: whether bars are shown.
        profile: the measured losses of single layers, for the allocation "knapsack" (see `profile_losses`).
        work: where factors are kept as they are found, and read from if they were found before (see `Work.open`).
        batches: the samples of the statistics, with several processes a share of them, for sequential factors: what
            the default method makes where they are given (see `CompressionConfig.sequential`). As `Marks`, which
            measuring the statistics took note of, they need not be run once more to find their active tokens.
        labels: whose labels the losses of `batches` are by, as in `compute_statistics`; None for the statistics' own.
        weighing: of this very model by `weighing_for`, for several budgets of it; None makes one.
        dtype: in which the model will be saved, by which a budget in bytes is priced; None for its own.

    Under several processes each factorizes its share of the layers, and all end with the same model. A model wrapped in
    DistributedDataParallel is taken out of it.

    Raises:
        LowRankError: nothing matches a pattern; a weight is not finite; statistics are missing, of another model or of
            other shapes; the budget cannot be met; the model is sharded over processes; `config.sequential` without
            batches, or with layers that it is not for.
    """
    model = unwrapped(model)
    started, before, factorized = time.perf_counter(), dense_parameters(model), factorized_layers(model)
    targets = checked_targets(model, config)
    earlier = earlier_steps(model, factorized)
    others = [Target.of(name, layer) for name, layer in factorized.items() if name not in targets]
    del factorized  # so that what is replaced can be freed
    solver = layer_solver(targets, config, statistics)
    if config.sequential and batches is None:
        raise LowRankError("sequential factors need the samples once more: give `batches`, those of the statistics")
    left = unreached(targets, statistics)
    one_shot = not is_wanted(model, targets, config, batches is not None)
    weighing = weighing or weighing_for(solver, config, work, progress, keep="once" if one_shot else "never")
    weighed = {name: target for name, target in targets.items() if name not in left}
    decided, bits = _decided(model, solver, config, weighed, weighing, profile, work, dtype)
    ranks = {name: decided.get(name) for name in targets}
    chosen = {name: target for name, target in targets.items() if ranks[name] is not None}
    own = "model" if statistics is not None and statistics.labels != "data" else "data"
    prefix = prefix_of(model, chosen, config, batches, labels or own, progress, work)
    del weighed, chosen  # so that what is replaced can be freed
    if config.sequential is None:
        config = replace(config, sequential=prefix is not None)
    try:
        model = to_low_rank_class(model)
    except ValueError as error:  # of a class that could not be found again when the saved model is loaded
        raise LowRankError(str(error)) from error
    layers, directions = _replace_layers(model, solver, ranks, config, progress, work, prefix, weighing)
    layers |= {name: replace(layers[name], note="no sample reached it") for name in left}
    described = {}
    if statistics is not None and config.needs:
        described = {"samples": statistics.samples, "labels": statistics.labels, "origin": statistics.origin}
    seconds, ordered = time.perf_counter() - started, tuple(layers[name] for name in ranks)
    report = CompressionReport(
        asdict(config),
        before,
        model.num_parameters(),
        seconds,
        ordered,
        described,
        earlier,
        untouched=tuple(map(kept_report, others)),
        directions=directions,
        bits=bits,
    )
    model.compression_report = report  # type: ignore[assignment]  # for the card, should the model be pushed
    return model, report


def checked_targets(model: PreTrainedModel, config: CompressionConfig) -> dict[str, Target]:
    """The layers to factorize, once it is known that they can be: before anything is measured for it.

    Raises:
        LowRankError: as `find_targets` and `check_weights`; the model is sharded; the form is for linear layers only.
    """
    if is_sharded(model):
        raise LowRankError(
            "the model is sharded by FSDP2, and a sharded layer cannot be replaced: save the statistics measured on "
            "it, and compress a copy that is not (device_map and CPU offload are fine, layers move one at a time)"
        )
    targets = find_targets(model, config.include, config.exclude)
    check_weights(targets)
    check_sequential(model, targets, config)
    if config.form != "factors" and any(target.kind in ("embedding", "convolution") for target in targets.values()):
        raise LowRankError(
            f"the {config.form} form is for linear layers: compress embeddings and convolutions in a step of their own"
        )
    return targets


def check_possible(model: PreTrainedModel, config: CompressionConfig, dtype: torch.dtype | None = None) -> None:
    """Raise where the model cannot be compressed as `config` says, before anything is measured for it.

    Args:
        model: to be compressed.
        config: how.
        dtype: as of `compress`.

    Raises:
        LowRankError: as `checked_targets`, `check_budget` and `check_bytes`.
    """
    targets = checked_targets(model, config)
    if config.budget.kind == "bytes":
        check_bytes(model, config, targets, dtype)
    layers = layers_for(config.budget, model, targets)
    before = dense_parameters(model)
    check_budget(layers, before, config.budget, config.spread, config.form, before - model.num_parameters())


def present_share(model: PreTrainedModel, config: CompressionConfig, statistics: Statistics | None) -> float:
    """What the layers that a budget counts cost now, as a share of what they cost dense: 1, unless compressed before.

    Raises:
        LowRankError: as `checked_targets` and `unreached`.
    """
    targets = checked_targets(model, config)
    left = unreached(targets, statistics)
    reports = [kept_report(target) for name, target in targets.items() if name not in left]
    return sum(report.parameters_after for report in reports) / sum(report.parameters_before for report in reports)


def earlier_steps(model: PreTrainedModel, factorized: Mapping[str, nn.Module]) -> tuple[dict[str, Any], ...]:
    """What is known of earlier compressions of a model, by its factorized layers if there is no report of them.

    Of a compression in another process that is only how small the model became.
    """
    report: CompressionReport | None = getattr(model, "compression_report", None)
    if report is not None:
        return (*report.earlier, report.step())
    return ({"parameters_after": model.num_parameters()},) if factorized else ()


def unreached(targets: Mapping[str, Target], statistics: Statistics | None) -> set[str]:
    """The layers that no sample's loss depends on, such as experts that no token was routed to: they stay dense.

    Raises:
        LowRankError: it depends on none of them.
    """
    found = {name for name in targets if statistics is not None and not statistics.reach(name)}
    if found == targets.keys():
        raise LowRankError(
            "by the statistics no sample's loss depends on any targeted layer; a loss that compares the samples of a "
            "batch (a contrastive one) is constant for a single sample: measure them with another head or task"
        )
    return found


def _replace_layers(
    model: PreTrainedModel,
    solver: LayerSolver,
    ranks: Ranks,
    config: CompressionConfig,
    progress: bool,
    work: Work | None,
    prefix: Prefix | None,
    weighing: Weighing,
) -> tuple[dict[str, LayerReport], Mapping[str, Directions]]:
    """Put factors in the place of every layer that has a rank; each process solves its share.

    What became of the layers, and the directions of those that have an order.
    """
    targets, directions = solver.targets, dict[str, Directions]()
    layers = {name: kept_report(targets[name]) for name, rank in ranks.items() if rank is None}
    costs = {name: estimated_cost(targets[name].shape) for name in ranks if name not in layers}
    kept, holders = work.store("factors") if work is not None else None, weighing.holders()
    left = KeptDirections(kept) if kept is not None and is_on_disk(model) else None
    steps: Iterable[tuple[LayerSolver, Sequence[str]]]
    steps = [(solver, [*costs])] if prefix is None else behind_each_other(prefix, solver, costs, kept)

    with bar(f"factorizing by {config.method}", len(costs), "layers", progress) as shown:
        for step_solver, names in steps:

            def solve(name: str, solver: LayerSolver = step_solver) -> Result:
                known = weighing.decomposition(name) if prefix is None else None
                low_rank, layer, found = solver.low_rank(name, ranks[name] or 1, known)
                return stored_parts(low_rank) | (vars(found) if found else {}), asdict(layer)

            for name, (factors, facts) in divided({name: costs[name] for name in names}, solve, kept, holders):
                file = kept.path(name) if kept is not None else None
                low_rank = placed_like(targets.pop(name).module, factors, file)  # and the dense layer can be freed
                replace_module(model, name, low_rank)
                layers[name] = LayerReport.from_dict(facts)
                if "worth" in factors and left is not None:
                    left.names[name] = None
                elif "worth" in factors:
                    directions[name] = Directions(*(factors[part].cpu() for part in PARTS))
                shown.update()
    restack_experts(model)
    for name in ranks:
        layer: Any = submodule(model, name)  # none in experts that are stacked again, as all of them stay dense
        if isinstance(layer, LowRankLinear) and layer.form != config.form:
            changed = converted(layer, config.form)
            if changed.num_parameters() <= layer.num_parameters():
                replace_module(model, name, changed)
                layers[name] = replace(layers[name], parameters_after=changed.num_parameters())
                directions.pop(name, None)  # they are of plain factors
    return layers, directions if left is None else left


def _decided(
    model: PreTrainedModel,
    solver: LayerSolver,
    config: CompressionConfig,
    weighed: Mapping[str, Target],
    weighing: Weighing,
    profile: Profile | None,
    work: Work | None,
    dtype: torch.dtype | None,
) -> tuple[Ranks, dict[str, int]]:
    """The ranks of the layers `weighed`, and, where the budget is in bytes, their bits."""
    if config.budget.kind == "bytes":
        stored = _main_decides(
            lambda: {n: asdict(s) for n, s in choose_stored(model, solver, config, weighed, dtype).items()}, work
        )
        return {name: kept["rank"] for name, kept in stored.items()}, {
            name: kept["bits"] for name, kept in stored.items()
        }

    def decide() -> Ranks:
        before, layers = dense_parameters(model), layers_for(config.budget, model, weighed)
        latency = latency_for(config.budget, weighed, layers)
        saved = before - model.num_parameters()
        rest: Any = (config.budget, config.spread, weighing.spectrum, profile, config.form, saved, latency)
        return allocate(layers, before, *rest)

    return _main_decides(decide, work), {}


def _main_decides(decide: Callable[[], Any], work: Work | None) -> Any:
    """The main process's ranks on all of them: a latency that each measured itself would differ."""
    if work is not None:
        return work.decided("ranks", decide)
    return agreed(decide())


def layer_solver(targets: dict[str, Target], config: CompressionConfig, statistics: Statistics | None) -> LayerSolver:
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
    return LayerSolver(targets, get_method(config.method), statistics, config.optimizer, config.gauge)
