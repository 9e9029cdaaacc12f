"""What was measured: for a person as a table, for a machine as JSON, for the record of the model in brief."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

DENSE, LOW = "dense", "compressed"
MEGABYTE = 1e6
REPEATS_WITHIN = 0.10  # the median of either half of the rounds, from that of all: or latencies are not stated


@dataclass(frozen=True)
class Case:
    """One shape of input in one phase ("forward", "prefill" or "decode"), by "dense" and "compressed".

    `seconds` are of every round: of the whole batch, and in "decode" of one token for each of its sequences.
    `operations` are floating-point operations of that, `peak_bytes` the weights and the activations at their peak.
    """

    phase: str
    batch: int
    length: int
    seconds: dict[str, list[float]]
    operations: dict[str, int]
    peak_bytes: dict[str, int]

    @property
    def tokens(self) -> int:
        """Tokens that one call takes in."""
        return self.batch if self.phase == "decode" else self.batch * self.length

    @property
    def speedup(self) -> float:
        """Dense time / compressed time: the median over rounds."""
        return statistics.median(a / b for a, b in zip(self.seconds[DENSE], self.seconds[LOW], strict=True))

    @property
    def arithmetic(self) -> float:
        """Dense operations / compressed operations: the speed-up if time were arithmetic."""
        return self.operations[DENSE] / self.operations[LOW]

    @property
    def realised(self) -> float:
        """The share of the arithmetic ratio that shows up as speed."""
        return self.speedup / self.arithmetic

    def median(self, which: str) -> float:
        """Median latency in milliseconds."""
        return 1000 * statistics.median(self.seconds[which])

    def p90(self, which: str) -> float:
        """The latency in milliseconds that nine of ten calls stay below."""
        return 1000 * _quantile(self.seconds[which], 0.9)

    def throughput(self, which: str) -> float:
        """Tokens per second at the median latency."""
        return 1000 * self.tokens / self.median(which)

    @property
    def repeats_within(self) -> float:
        """How far the median of either half of the rounds, at most, is from that of all, as a share; inf of one round.

        The halves are the first and the last rounds: a machine that others use meanwhile differs between them.
        """
        half = min(map(len, self.seconds.values())) // 2
        if half == 0:
            return math.inf
        parts = [(part, seconds) for seconds in self.seconds.values() for part in (seconds[:half], seconds[-half:])]
        return max(abs(statistics.median(part) / statistics.median(whole) - 1) for part, whole in parts)

    def to_dict(self, rounds: bool = True) -> dict[str, Any]:
        """Everything as plain JSON values, the seconds of single rounds only if asked for."""
        both = (DENSE, LOW)
        return {
            "phase": self.phase,
            "batch": self.batch,
            "length": self.length,
            "median_ms": {which: round(self.median(which), 4) for which in both},
            "p90_ms": {which: round(self.p90(which), 4) for which in both},
            "tokens_per_second": {which: round(self.throughput(which), 1) for which in both},
            "peak_bytes": self.peak_bytes,
            "operations": self.operations,
            "speedup": round(self.speedup, 4),
            "arithmetic": round(self.arithmetic, 4),
            "realised": round(self.realised, 4),
        } | ({"seconds": self.seconds} if rounds else {})


@dataclass(frozen=True)
class BenchRecord:
    """A whole run. `load_seconds` and `first_output_seconds` (loading included) are medians, `bytes` file sizes.

    `cache_bytes` are of the keys and values of one token: as they are kept, and what they would be if in their place
    the inner channels of those with factors were kept, which no runtime does; empty where they are not known.
    `quantized_by` is the library that quantized the compressed model.
    """

    model: str
    dense: str
    dtype: str
    compiled: bool
    rounds: int
    machine: dict[str, Any]
    parameters: dict[str, int]
    bytes: dict[str, int | None]
    load_seconds: dict[str, float]
    first_output_seconds: dict[str, float]
    cases: tuple[Case, ...]
    cache_bytes: dict[str, int] = field(default_factory=dict)
    quantized_by: str | None = None

    @property
    def setup(self) -> str:
        """Where and how it was measured, in a line."""
        threads = self.machine["threads"]
        place = self.machine.get("accelerator") or f"{threads} thread{'s' * (threads > 1)} of {self.machine['cpu']}"
        compiled = "torch.compile" if self.compiled else "not compiled"
        bits = f", quantized by {self.quantized_by}" if self.quantized_by else ""
        return f"{self.dtype}{bits}, {compiled}, {place}, torch {self.machine['torch']}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**vars(self), "setup": self.setup, "cases": [case.to_dict() for case in self.cases]}

    @property
    def stated(self) -> Case:
        """The case whose latency a card states: the largest batch."""
        return max((case for case in self.cases if case.phase != "decode"), key=lambda case: case.tokens)

    def not_stated(self) -> str | None:
        """Why no latency should be stated: its rounds do not agree within 10%; None where they do."""
        spread = self.stated.repeats_within
        if spread <= REPEATS_WITHIN:
            return None
        found = "one round shows nothing of it" if spread == math.inf else f"halves of the rounds are {spread:.0%} off"
        advice = "measure on a quiet machine, with more rounds"
        return f"the latency does not repeat within {REPEATS_WITHIN:.0%}, {found}: {advice}"

    def latency_facts(self) -> dict[str, Any]:
        """What goes into a model's record: the largest batch in milliseconds, and every case in brief."""
        largest = self.stated
        return {
            "dense": round(largest.median(DENSE), 3),
            "compressed": round(largest.median(LOW), 3),
            "setup": f"batch {largest.batch} × {largest.length} tokens, {largest.phase}, {self.setup}",
            "machine": self.machine,
            "quantized_by": self.quantized_by,
            "load_seconds": self.load_seconds,
            "cases": [case.to_dict(rounds=False) for case in self.cases],
        }

    def cases_table(self) -> Table:
        """Latency, throughput and memory, dense → compressed, in a row for each case."""
        table = Table(
            "phase", "batch × length", "median, ms", "p90, ms", "tokens/s", "peak, MB", "speed-up", "arithmetic",
            "realised", box=None, title=f"dense → compressed, {self.setup}, {self.rounds} rounds in turns",
        )  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        for case in self.cases:
            table.add_row(
                case.phase,
                f"{case.batch} × {case.length}",
                _arrow(case.median, milliseconds),
                _arrow(case.p90, milliseconds),
                _arrow(case.throughput, "{:,.0f}".format),
                _arrow(lambda which, case=case: case.peak_bytes[which] / MEGABYTE, "{:.4g}".format),
                f"{case.speedup:.2f}",
                f"{case.arithmetic:.2f}",
                f"{case.realised:.0%}",
            )
        return table

    def loading_table(self) -> Table:
        """Size and load time."""
        table = Table("", "dense", "compressed", "dense / compressed", box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        rows: list[tuple[str, Any, str, float]] = [
            ("parameters", self.parameters, "{:,.0f}", 1),
            ("weight files, MB", self.bytes, "{:,.1f}", MEGABYTE),
            ("load, ms", self.load_seconds, "{:,.0f}", 1e-3),
            ("load and first output, ms", self.first_output_seconds, "{:,.0f}", 1e-3),
        ]
        if self.cache_bytes:
            rows.append(("cache a token, B (could be)", self.cache_bytes, "{:,.0f}", 1))
        for name, values, pattern, unit in rows:
            if values[DENSE] is not None:
                both = [pattern.format(values[which] / unit) for which in (DENSE, LOW)]
                table.add_row(name, *both, f"{values[DENSE] / values[LOW]:.2f}")
        return table


def milliseconds(value: float) -> str:
    """With three digits, or all of those before the point.

    >>> milliseconds(9.974), milliseconds(1234.5)
    ('9.97', '1,234')
    """
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _arrow(value: Any, shown: Callable[[float], str]) -> str:
    return f"{shown(value(DENSE))} → {shown(value(LOW))}"


def _quantile(values: Sequence[float], share: float) -> float:
    """The value at a share of the sorted values, between two of them if need be.

    >>> _quantile([3.0, 1.0, 2.0], 0.75)
    2.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
