"""What every benchmark shares: its options, competitors timed in alternation, a table, and facts about the machine."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.studies.bench.machine import machine_facts

__all__ = [
    "Lines",
    "Options",
    "Result",
    "Row",
    "Spread",
    "alternate",
    "machine_facts",
    "mean_of",
    "milliseconds",
    "ratio",
    "repeats_for",
    "steady_clock",
]

Row = dict[str, str]


@dataclass(frozen=True)
class Options:
    """The options of the command. `model` is a folder or Hub name; without it, benchmarks make up their data."""

    threads: int = 1
    rounds: int = 5
    model: str | None = None
    task: str | None = None
    data_dir: Path | None = None
    all_layers: bool = False
    everything: bool = False
    sample: int = 200
    seed: int = 0
    output: Path = Path("benchmarks/results")
    train: bool = False
    cache: Path | None = None
    tokens: int | None = None
    methods: tuple[str, ...] | None = None
    json: Path | None = None


@dataclass(frozen=True)
class Result:
    """A benchmark's outcome: a title, rows of one table (the same columns in each), remarks, and figures for JSON."""

    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The title, the table and the notes.

        >>> print(Result("T", [{"a": "1", "b": "2"}]).markdown())
        ### T
        <BLANKLINE>
        | a | b |
        |---|---|
        | 1 | 2 |
        """
        columns = list(self.rows[0])
        lines = [columns, *([row[column] for column in columns] for row in self.rows)]
        table = ["| " + " | ".join(line) + " |" for line in lines]
        table.insert(1, "|" + "---|" * len(columns))
        return "\n".join([f"### {self.title}", "", *table, *([""] if self.notes else []), *self.notes])


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, quoted as median (min–max)."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def text(self, pattern: str = "{:.2f}") -> str:
        """The median and the range, each in the given format.

        >>> Spread((1.0, 3.0, 2.0)).text("{:.1f}")
        '2.0 (1.0–3.0)'
        """
        middle, low, high = (pattern.format(value) for value in (self.median, min(self.values), max(self.values)))
        return f"{middle} ({low}–{high})"


@dataclass(frozen=True)
class Lines:
    """Rows of figures in a file, one JSON object in each line, so that a benchmark that ended early goes on there."""

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        """All that are there."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []

    def has(self, **known: Any) -> bool:
        """Whether there is a row with these entries."""
        return any(all(row.get(key) == value for key, value in known.items()) for row in self.rows())

    def add(self, **row: Any) -> None:
        """Write one more."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def mean_of(values: Sequence[float], digits: int) -> str:
    """The mean, with its standard error where there are several values.

    >>> mean_of([1.0, 3.0], 1)
    '2.0 ± 1.0'
    """
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def steady_clock() -> Callable[[], float]:
    """The thread's CPU time where PyTorch has one thread, which others on the machine do not stretch; or wall time.

    Only for work that neither waits nor starts threads of its own.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def alternate(
    competitors: Mapping[str, Callable[[], Any]],
    rounds: int,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each competitor in each round, taken in turn (A B A B …), after one round that is not counted.

    Turns put all competitors under the same conditions, so that ratios within a round are fair on a shared machine.
    A competitor is called `repeats` times in a turn, and the time of one call is kept.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + 1):
        for name, competitor in competitors.items():
            started = clock()
            for _ in range(repeats):
                competitor()
            if turn > 0:
                seconds[name].append((clock() - started) / repeats)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The ratios of the rounds."""
    return Spread(tuple(a / b for a, b in zip(numerator, denominator, strict=True)))


def repeats_for(call: Callable[[], Any], seconds: float = 0.02) -> int:
    """How often to repeat a call so that one turn lasts about this long."""
    call()
    started = time.perf_counter()
    call()
    return max(1, round(seconds / (time.perf_counter() - started)))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median in milliseconds, as text."""
    return f"{1000 * statistics.median(seconds):.3g}"
