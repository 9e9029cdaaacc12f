"""What a compression did, layer by layer: for a person as a table, for a machine as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from hf_lowrank.allocation.budget import BUDGETS

if TYPE_CHECKING:
    from hf_lowrank.compression.directions import Directions

AFTERWARDS = {"healing": "healed", "finetuning": "fine-tuned"}  # what a record says was done after the compression


@dataclass(frozen=True)
class LayerReport:
    """One targeted layer. `rank` is None where it stayed dense; `note` says why a layer stayed as it was.

    `parameters_before` are those of the dense layer, also where it was factorized before. `relative_error` is
    ‖W − UD‖ / ‖W‖ and `weighted_error` the same under the method's own importance, 0 where it stayed as it was.
    `expected_loss` is what the change is expected to add to the loss, to second order; None where the statistics do not
    tell. `trace` is the objective after every iteration, for methods that iterate. `fisher_cosine` is how close a
    method's Kronecker product comes to the Fisher information of whole samples (see `Statistics.fisher_cosine`).
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    parameters_before: int
    parameters_after: int
    relative_error: float = 0.0
    weighted_error: float = 0.0
    expected_loss: float | None = 0.0
    seconds: float = 0.0
    note: str = ""
    trace: tuple[float, ...] = ()
    fisher_cosine: float | None = None

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "LayerReport":
        """The report that `asdict` was called on, also through JSON."""
        return cls(**{**record, "trace": tuple(record["trace"])})


@dataclass(frozen=True)
class CompressionReport:
    """A compression: its settings, the whole model's parameters before and after, and every targeted layer.

    Before is the dense model, also where this was not the first compression.

    Args:
        settings: the `CompressionConfig`, as plain values.
        parameters_before: of the whole dense model.
        parameters_after: of the whole model, compressed.
        seconds: that choosing ranks and factorizing took.
        layers: what became of each targeted layer.
        statistics: over how many samples they were, and of what; empty where the method needs none.
        earlier: what is known of the compressions before this one, the first one first.
        untouched: the layers that those factorized and this one did not target.
        bits: of a weight, for each layer, where a budget in bytes chose them.
        directions: what the directions of each layer are worth, where they have an order: not among the plain values.
    """

    settings: dict[str, Any]
    parameters_before: int
    parameters_after: int
    seconds: float
    layers: tuple[LayerReport, ...]
    statistics: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[dict[str, Any], ...] = ()
    untouched: tuple[LayerReport, ...] = ()
    bits: dict[str, int] = field(default_factory=dict)
    directions: "Mapping[str, Directions]" = field(default_factory=dict, compare=False, repr=False)

    @property
    def targeted_before(self) -> int:
        """Parameters of the targeted layers before."""
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def targeted_after(self) -> int:
        """Parameters of the targeted layers after."""
        return sum(layer.parameters_after for layer in self.layers)

    @property
    def expected_loss(self) -> float | None:
        """What all changes together are expected to add to the loss; None where the statistics do not tell."""
        losses = [layer.expected_loss for layer in self.layers]
        return None if None in losses else sum(loss for loss in losses if loss is not None)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every factorized layer."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        totals = ("targeted_before", "targeted_after", "expected_loss")
        plain = {key: value for key, value in asdict(replace(self, directions={})).items() if key != "directions"}
        return plain | {name: getattr(self, name) for name in totals}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "CompressionReport":
        """The report that `to_dict` was called on.

        Args:
            record: its fields as plain values.
        """
        layers, rest = (
            [LayerReport.from_dict(layer) for layer in record.get(key, ())] for key in ("layers", "untouched")
        )
        kept = ("settings", "parameters_before", "parameters_after", "seconds", "statistics")
        earlier = tuple(record.get("earlier", ()))
        return cls(**{key: record[key] for key in kept}, layers=tuple(layers), earlier=earlier, untouched=tuple(rest))

    def step(self) -> dict[str, Any]:
        """What a further compression keeps of this one."""
        facts = {"settings": self.settings, "parameters_after": self.parameters_after, "statistics": self.statistics}
        return {key: value for key, value in facts.items() if value}

    def summary(self) -> str:
        """The totals in a few lines."""
        dense = sum(layer.rank is None for layer in self.layers)
        stay = sum(layer.rank is not None and bool(layer.note) for layer in self.layers)
        kept = f"{stay} left at the rank they had, " if stay else ""
        expected = "" if self.expected_loss is None else f"\nexpected loss increase {self.expected_loss:.4g}"
        before = "".join(f"{described(step)}\n" for step in self.earlier)
        return (
            f"{before}{len(self.ranks) - stay} layers factorized by {self.settings.get('method')}, {kept}"
            f"{dense} left dense, in {self.seconds:.1f} s\n"
            f"parameters kept: {_share(self.targeted_after, self.targeted_before)} of the targeted layers' "
            f"({_count(self.targeted_before)} → {_count(self.targeted_after)}), "
            f"{_share(self.parameters_after, self.parameters_before)} of the whole model's "
            f"({_count(self.parameters_before)} → {_count(self.parameters_after)}){expected}{self._nearness()}"
        )

    def _nearness(self) -> str:
        """How near the method's Kronecker products come to the Fisher information, where that was measured."""
        cosines = [layer.fisher_cosine for layer in self.layers if layer.fisher_cosine is not None]
        if not cosines:
            return ""
        middle, least, most = median(cosines), min(cosines), max(cosines)
        return f"\ncosine with the Fisher information of whole samples {middle:.2f} ({least:.2f} to {most:.2f})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(
            "layer", "out × in", "rank", "parameters", "relative error", "weighted error", "seconds", box=None
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for layer in self.layers:
            rank = str(layer.rank) if layer.rank is not None else "dense"
            size = f"{layer.parameters_before:,} → {layer.parameters_after:,}"
            errors = (
                (f"{layer.relative_error:.4f}", f"{layer.weighted_error:.4f}") if not layer.note else (layer.note, "")
            )
            table.add_row(
                layer.name, f"{layer.out_features} × {layer.in_features}", rank, size, *errors, f"{layer.seconds:.2f}"
            )
        yield table
        yield self.summary()

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def described(step: dict[str, Any]) -> str:
    """An earlier compression in a few words, from what its record says.

    >>> described({"settings": {"method": "kfac", "keep": 0.5}, "parameters_after": 2_500_000})
    'compressed before by kfac, keep 0.5, to 2.50M parameters'
    """
    settings = step.get("settings", {})
    budget = [f"{kind} {settings[kind]}" for kind in BUDGETS if settings.get(kind) is not None]
    tuned = "".join(f" and {word}" for key, word in AFTERWARDS.items() if key in step)
    made = ", ".join(["before" + (f" by {settings['method']}" if settings else ""), *budget])
    return f"compressed {made}, to {_count(step['parameters_after'])} parameters{tuned}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f}M" if parameters >= 1e5 else f"{parameters:,}"


def _share(after: int, before: int) -> str:
    return f"{after / before:.1%}"
