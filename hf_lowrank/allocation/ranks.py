"""A budget, spread over the targeted layers by an allocation within bounds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hf_lowrank.allocation.budget import (
    AlreadySmaller,
    Budget,
    ImpossibleBudget,
    Limit,
    check_range,
    limit_of,
    readable,
)
from hf_lowrank.allocation.choices import Choices, Ranks, cheapest, dearest, layer_choices
from hf_lowrank.allocation.costs import Cost, Layer, Shape, flops, in_interpolative_form, parameters, parameters_at
from hf_lowrank.allocation.rules import ALLOCATIONS, get_allocation
from hf_lowrank.allocation.spread import Spread
from hf_lowrank.errors import LowRankError

Spectrum = Callable[[str], Sequence[float]]  # name → what discarding each direction adds to the loss, largest first
Profile = dict[str, dict[int, float]]  # the loss measured when a layer alone has a rank, by name and rank


def allocate(
    layers: Mapping[str, Layer],
    model_parameters: int,
    budget: Budget,
    spread: Spread,
    spectrum: Spectrum | None = None,
    profile: Profile | None = None,
    form: str = "factors",
    saved: int = 0,
    latency: Cost | None = None,
) -> Ranks:
    """The rank of every layer, None where it stays as it is, that together cost no more than the budget.

    A layer that is factorized already may get any rank below its own, or stays as it is at what it costs now. Budgets
    count against the dense model that it was.

    Args:
        layers: those that are targeted, by name.
        model_parameters: those of the whole dense model, these layers included.
        budget: what they may cost.
        spread: how it is spread over them.
        spectrum: name → what discarding each direction adds to the loss, largest first; for allocations that ask it.
        profile: measured losses by name and rank; for those that ask for it (see `hf_lowrank.compression.profiling`).
        form: that of the factorized layers, which decides what a rank costs. A rank ratio stands for what plain factors
            of it cost, so that another form gets larger ranks for the same number of parameters.
        saved: parameters by which the model is smaller already than the dense one.
        latency: the time that a layer takes, for a budget of it.

    Raises:
        LowRankError: the budget is below the least possible or above the present size, or the profile or the latency is
            missing.
    """
    rule = get_allocation(spread.allocation)
    limit, plain = _limited(layers, model_parameters, budget, spread, form, saved, latency)
    total = max(limit.total, cheapest(plain))  # but for rounding
    chosen, choices = ALLOCATIONS["uniform"].decide(plain, total), plain
    if rule.losses != "none":
        uniform = {name: each.ranks[chosen[name]] for name, each in plain.items()}
        cost_of = {name: limit.cost_of(layers[name].uses) for name in plain}
        from_spectrum = rule.losses == "spectrum"
        choices = {
            name: _bounded(each, uniform[name], cost_of[name], spread, spectrum if from_spectrum else None, name)
            for name, each in plain.items()
        }
        if rule.losses == "profile":
            choices = {name: _profiled(name, each, profile) for name, each in choices.items()}
            if cheapest(choices) > total * (1 + 1e-9):
                raise ImpossibleBudget(
                    f"{budget.kind} {budget.value:g} cannot be met by the ranks that were profiled, the smallest of "
                    f"which take {limit.shown(cheapest(choices)):g}: profile smaller ones (`ratios` of profile_losses)"
                )
        chosen = rule.decide(choices, max(total, cheapest(choices)))
    return {name: choices[name].ranks[index] for name, index in chosen.items()}


def uniform_ranks(shapes: dict[str, Shape], rank_ratio: float) -> dict[str, int]:
    """rank_ratio · min(in, out) for every layer, rounded, at least 1. The papers' setting."""
    return {name: _uniform_rank(shape, rank_ratio) for name, shape in shapes.items()}


def _uniform_rank(shape: Shape, rank_ratio: float) -> int:
    return max(1, round(rank_ratio * min(shape)))


def check_budget(
    layers: Mapping[str, Layer],
    model_parameters: int,
    budget: Budget,
    spread: Spread,
    form: str = "factors",
    saved: int = 0,
) -> None:
    """Raise where no ranks meet the budget, before anything is measured for it. Arguments as in `allocate`.

    Raises:
        ImpossibleBudget: the message gives the possible range.
        LowRankError: the budget is for another form.
    """
    if budget.kind not in ("latency", "bytes"):  # those take measurements themselves
        _limited(layers, model_parameters, budget, spread, form, saved)


def _limited(
    layers: Mapping[str, Layer],
    model_parameters: int,
    budget: Budget,
    spread: Spread,
    form: str,
    saved: int,
    latency: Cost | None = None,
) -> tuple[Limit, dict[str, Choices]]:
    """What all layers may cost together, and what each may choose from, bounds apart."""
    shapes = {name: layer.shape for name, layer in layers.items()}
    others = model_parameters - saved - sum(_kept_cost(layer, parameters, "factors") for layer in layers.values())
    limit = _limit(budget, list(layers.values()), model_parameters, others, latency)
    if form == "interpolative":
        limit = replace(limit, cost=in_interpolative_form(limit.cost))
    plain = {}
    for name, layer in layers.items():
        kept, cost = _kept_cost(layer, limit.cost, form), limit.cost_of(layer.uses)
        plain[name] = layer_choices(layer.shape, cost, ranks_below(layer, spread), kept=kept)
    if budget.kind == "rank_ratio" and spread.allocation == "uniform":  # what has fewer ranks leaves none to others
        ranks = uniform_ranks(shapes, budget.value)
        at_ratio = {name: parameters_at(shape, ranks[name]) for name, shape in shapes.items()}
        limit = replace(limit, total=sum(min(at_ratio[name], plain[name].costs[-1]) for name in plain))
    if any(layer.rank for layer in layers.values()) and limit.total >= dearest(plain) * (1 - 1e-9):
        now = "" if budget.kind == "rank_ratio" else f", to {readable(budget, limit.shown(dearest(plain)))}"
        raise AlreadySmaller(
            f"{budget.kind} {readable(budget, budget.value)} would leave every layer as it is: the model was "
            f"compressed before{now}, and budgets count against the dense model that it was; give less"
        )
    if budget.kind != "rank_ratio":
        check_range(budget, limit, cheapest(plain), dearest(plain))
    else:
        _refuse_coarse(budget, spread, limit, cheapest(plain))
    return limit, plain


def _refuse_coarse(budget: Budget, spread: Spread, limit: Limit, least: float) -> None:
    if limit.total < least * (1 - 1e-9):
        raise ImpossibleBudget(
            f"rank_ratio {budget.value:g} cannot be met by ranks that are multiples of {spread.align}: it stands for "
            f"{limit.total:,.0f} parameters, and the smallest take {least:,.0f}; give a larger ratio or a smaller align"
        )


def _kept_cost(layer: Layer, cost: Cost, form: str) -> float:
    """What a layer costs that stays as it is: in the form that is asked for where that costs no more."""
    if layer.form == "interpolative" != form and cost in (parameters, flops):
        cost = in_interpolative_form(cost)
    return cost(layer.shape, layer.rank, layer.uses)


def ranks_below(layer: Layer, spread: Spread) -> Sequence[int]:
    """The ranks that a layer may get, all below its own."""
    return [allowed for allowed in spread.ranks(layer.shape) if layer.rank is None or allowed < layer.rank]


def _limit(
    budget: Budget, layers: Sequence[Layer], model_parameters: int, others: float, latency: Cost | None
) -> Limit:
    if budget.kind != "rank_ratio":
        return limit_of(budget, layers, model_parameters, others, latency)
    total = sum(parameters_at(layer.shape, _uniform_rank(layer.shape, budget.value)) for layer in layers)
    return Limit(total, parameters, lambda total: total)


def _bounded(
    each: Choices,
    uniform: int | None,
    cost: Callable[[Shape, int | None], float],
    spread: Spread,
    spectrum: Spectrum | None,
    name: str,
) -> Choices:
    """The choices of a layer with their losses, between the floor and the cap around its uniform rank."""
    saving = [rank for rank in each.ranks if rank is not None]
    around = max(saving, default=1) if uniform is None else uniform
    least, most = spread.floor * around, spread.cap * around
    values = None if spectrum is None else spectrum(name)
    return layer_choices(each.shape, cost, saving, least, most, values, kept=each.costs[-1])


def _profiled(name: str, each: Choices, profile: Profile | None) -> Choices:
    """The choices of a layer that were measured, and dense, with losses made to never rise with the rank."""
    measured = (profile or {}).get(name, {})
    kept = [n for n, rank in enumerate(each.ranks) if rank is None or rank in measured]
    if each.ranks != (None,) and not any(rank in measured for rank in each.ranks):
        raise LowRankError(
            f"{name}: the profile has no measured loss at a rank that the bounds allow; see "
            "hf_lowrank.compression.profiling.profile_losses"
        )
    losses: list[float] = []
    for n in reversed(kept):
        rank = each.ranks[n]
        losses.insert(0, max(0.0 if rank is None else measured[rank], losses[0] if losses else 0.0))
    ranks, costs = tuple(each.ranks[n] for n in kept), tuple(each.costs[n] for n in kept)
    return replace(each, ranks=ranks, costs=costs, losses=tuple(losses))
