"""What a sweep is over, checked without tensors → the compressions that it makes."""

import math
from dataclasses import dataclass
from typing import Any

from hf_lowrank.allocation.budget import BUDGETS
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.settings import check_settings
from hf_lowrank.solvers.family import COMPARED, get_method


@dataclass(frozen=True)
class SweepConfig:
    """What to sweep over, and how each model is made and judged.

    Args:
        methods: names in `METHODS`.
        allocations: names in `ALLOCATIONS`; None for each method's own.
        budget: a key of `BUDGETS`, `values` its values.
        epochs: of fine-tuning after compression, scored besides; 0 for none. `bf16` makes it faster.
        include: as in `CompressionConfig`, of all models alike; so are `exclude`, `align` and `form`.
        sequential: likewise, of the methods that can.

    Raises:
        LowRankError: an unknown name, or a value out of range.
    """

    methods: tuple[str, ...] = COMPARED
    allocations: tuple[str, ...] | None = None
    budget: str = "rank_ratio"
    values: tuple[float | str, ...] = (0.5, 0.33, 0.2, 0.1)
    epochs: float = 0
    bf16: bool = False
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    align: int | None = None
    form: str = "factors"
    sequential: bool | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.methods or not self.values or self.allocations == ():
            raise LowRankError("a sweep needs one method, one value and, where they are given, one allocation at least")
        if not 0 <= self.epochs < math.inf:
            raise LowRankError(f"epochs must be at least 0; they are {self.epochs}")
        if self.budget not in BUDGETS:
            raise LowRankError(f"unknown budget {self.budget!r}; there are {', '.join(BUDGETS)}")
        self.runs()

    def runs(self) -> list[CompressionConfig]:
        """Every compression of the sweep, in order."""
        common: dict[str, Any] = {name: getattr(self, name) for name in ("include", "exclude", "align", "form")}
        return [
            CompressionConfig(
                method, allocation=allocation, sequential=self._sequential(method), **common | {self.budget: value}
            )
            for method in self.methods
            for allocation in self.allocations or (get_method(method).allocation,)
            for value in self.values
        ]

    def _sequential(self, method: str) -> bool | None:
        """As asked for, where the method can; a method that cannot is what it always is."""
        return self.sequential if get_method(method).can_be_sequential else None
