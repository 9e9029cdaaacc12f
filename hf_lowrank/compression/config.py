"""How to compress: a method, one budget, how it is spread over layers, and which layers. Checked without tensors."""

import math
from dataclasses import dataclass

from hf_lowrank.allocation.budget import BUDGETS, Budget, parse_bytes, parse_count
from hf_lowrank.allocation.costs import PLAIN_ONLY
from hf_lowrank.allocation.rules import get_allocation
from hf_lowrank.allocation.spread import Spread, check_bounds
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.settings import check_choice, check_settings
from hf_lowrank.solvers.family import DEFAULT_GAUGE, GAUGE_NAMES, METHODS, check_optimizer, get_method

DEFAULT_RANK_RATIO = 0.33
FORM_NAMES = ("factors", "interpolative")  # of `hf_lowrank.nn.layers_lowrank.FORMS`, which takes time to import


@dataclass(frozen=True)
class CompressionConfig:
    """How to compress: a method (see `METHODS`), one budget, how it is spread over layers, and which layers.

    The budget is one of `rank_ratio`, `keep`, `keep_model`, `params`, `bytes`, `flops` and `latency` (see `BUDGETS`);
    without any, a rank ratio of 0.33.

    Args:
        method: what is minimised, a name in `METHODS`.
        rank_ratio: rank / min(in, out) of every layer; allocations but "uniform" get as many parameters.
        allocation: how the budget is spread over layers, a name in `ALLOCATIONS`; None for the method's own.
        include: name patterns of layers (see `find_targets`); None for the linears inside the blocks.
        exclude: name patterns of layers to leave dense.
        keep: share of the targeted layers' parameters.
        keep_model: share of the whole model's parameters.
        params: parameters of the whole compressed model, a number or such as "66.5M".
        bytes: of the whole compressed model's weights, each layer's in 8 or 4 bits, a number or such as "12MB".
        flops: floating-point operations of one token through the targeted layers.
        latency: share of the targeted layers' time, measured on this machine.
        align: ranks are multiples of it; None for 8 where that is faster.
        floor: the least rank of a layer, as a share of its uniform rank (see `Spread`).
        cap: the largest, as a multiple of its uniform rank; None for no bound.
        optimizer: for methods that iterate, a name in `OPTIMIZERS`; None for the default.
        form: how factors are stored, "factors" or "interpolative" (see `to_form`).
        gauge: the basis of their inner channels, "flat" (least lost by rounding) or "balanced" (see `GAUGES`).
        sequential: whether layers are factorized in the order of the forward pass, each for what it reads behind those
            before it, so as to say what the dense layer would have said: for methods that count inputs by their moment.
            None for the method's own (`Method.sequential`), which is in one shot where the samples are not given, or
            where a layer is an expert, a tied embedding, or used several times; the report says which.

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
    bytes: float | str | None = None
    flops: float | str | None = None
    latency: float | None = None
    align: int | None = None
    floor: float = 0.0
    cap: float | None = None
    optimizer: str | None = None
    form: str = FORM_NAMES[0]
    gauge: str = DEFAULT_GAUGE
    sequential: bool | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        method = get_method(self.method)
        if self.allocation is None:
            object.__setattr__(self, "allocation", method.allocation)
        get_allocation(self.allocation or "")
        if all(getattr(self, kind) is None for kind in BUDGETS):
            object.__setattr__(self, "rank_ratio", DEFAULT_RANK_RATIO)
        if self.optimizer is not None:
            check_optimizer(self.optimizer)
            if not method.iterates:
                iterating = ", ".join(name for name, method in METHODS.items() if method.iterates)
                raise LowRankError(f"{self.method} has a closed form; an optimizer is for {iterating}")
        check_choice("form", self.form, FORM_NAMES)
        check_choice("gauge", self.gauge, GAUGE_NAMES)
        if self.gauge != DEFAULT_GAUGE and self.form != FORM_NAMES[0]:
            raise LowRankError(f"the {self.form} form has a basis of its own: leave out the gauge {self.gauge!r}")
        if self.sequential and not method.can_be_sequential:
            able = ", ".join(name for name, method in METHODS.items() if method.can_be_sequential)
            raise LowRankError(f"{self.method} does not count inputs by their moment; sequential is for {able}")
        if self.budget.kind == "latency" and self.form != FORM_NAMES[0]:
            raise LowRankError(PLAIN_ONLY)
        check_bounds(self.align, self.floor, self.cap)
        spread = (self.form, self.allocation, self.floor, self.cap)
        if self.bytes is not None and spread != (FORM_NAMES[0], "greedy", 0.0, None):
            raise LowRankError("a budget in bytes is spread greedily over plain factors, without floor and cap")

    @property
    def budget(self) -> Budget:
        """The budget that was given.

        Raises:
            LowRankError: several were given, or its value is out of range.
        """
        given = {kind: value for kind in BUDGETS if (value := getattr(self, kind)) is not None}
        if len(given) > 1:
            raise LowRankError(f"give one budget, not {len(given)}: {', '.join(given)}")
        ((kind, value),) = given.items()
        return Budget(kind, parse_bytes(value) if kind == "bytes" else parse_count(value))

    @property
    def spread(self) -> Spread:
        """How it is spread over layers."""
        return Spread(self.allocation or "uniform", self.align, self.floor, math.inf if self.cap is None else self.cap)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that compressing takes: the method's, and those that make its layers comparable."""
        return get_method(self.method).needs_for(get_allocation(self.allocation or "uniform").losses == "spectrum")
