"""Sums that depend on a layer's input alone: one for all layers that read the same tokens, as q, k and v do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_lowrank.jobs.distributed import from_everyone, summed
from hf_lowrank.model.weights import sums_device
from hf_lowrank.statistics.kinds import accumulate, completed, sum_shape


@dataclass(eq=False)
class _Cell:
    """The sums by kind that some layers have in common, up to now."""

    members: set[str]
    sums: dict[str, Tensor]


class InputSums:
    """Sums of the kinds that only inputs decide (`Kind.of_input`), kept once for layers whose inputs never differed.

    Layers differ where they read other tensors, or where other tokens of the same tensor are active: the last query of
    an encoder is read at one position, its key and value at all. From the first batch where they do, each has its own.
    """

    def __init__(self, kinds: Sequence[str], targets: dict[str, nn.Module], device: torch.device | None) -> None:
        self.kinds, self.targets, self.device = kinds, targets, device
        self.cells: dict[str, _Cell] = {}
        self.waiting: dict[tuple[str, ...], dict[str, tuple[Tensor, Tensor]]] = {}

    def arrive(self, name: str, x: Tensor, active: Tensor, readers: tuple[str, ...]) -> None:
        """Take one layer's input x [batch, tokens, in] and its active tokens [batch, tokens].

        It is added up when all of `readers`, the layers that read this input, have arrived, or the batch has ended.
        """
        waiting = self.waiting.setdefault(readers, {})
        waiting[name] = (x, active)
        if len(waiting) == len(readers):
            self._add(self.waiting.pop(readers))

    def end_batch(self) -> None:
        """Add up what still waits for layers that got no gradient."""
        for arrived in self.waiting.values():
            self._add(arrived)
        self.waiting.clear()

    def state(self) -> tuple[dict[str, Tensor], list[list[str]]]:
        """The sums up to now between two batches, by cell and kind, and the members of every cell."""
        cells = list({self.cells[name]: None for name in self.targets if name in self.cells})
        sums = {f"{n}/{kind}": cell.sums[kind] for n, cell in enumerate(cells) for kind in self.kinds}
        return sums, [sorted(cell.members) for cell in cells]

    def restore(self, sums: dict[str, Tensor], members: list[list[str]]) -> None:
        """Go on from a `state`."""
        for n, names in enumerate(members):
            device = self.device or sums_device(self.targets[names[0]])
            self._assign(names, {kind: sums[f"{n}/{kind}"].to(device, copy=True) for kind in self.kinds})

    def result(self) -> dict[str, dict[str, Tensor]]:
        """The sums over all processes by kind and name; layers that shared them everywhere share the tensors."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, label in self._labels().items():
            groups.setdefault(label, []).append(name)
        sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        for names in groups.values():
            own = self.cells[names[0]].sums if names[0] in self.cells else self._zeros(names[0])
            for kind in self.kinds:
                sums[kind] |= dict.fromkeys(names, completed(kind, summed(own[kind])))
        return {kind: {name: by_name[name] for name in self.targets} for kind, by_name in sums.items()}

    def _labels(self) -> dict[str, tuple[int, ...]]:
        """For each layer the number of its cell on each process; layers without one have a number of their own."""
        numbers: dict[_Cell, int] = {}
        mine = {}
        for n, name in enumerate(self.targets):
            cell = self.cells.get(name)
            mine[name] = -1 - n if cell is None else numbers.setdefault(cell, len(numbers))
        everyone = from_everyone(mine)
        return {name: tuple(numbers[name] for numbers in everyone) for name in self.targets}

    def _add(self, arrived: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add an input for every group of its readers that agree in which tokens are active."""
        groups: list[tuple[Tensor, Tensor, list[str]]] = []
        for name, (x, active) in arrived.items():
            same = next((names for _, other, names in groups if torch.equal(active, other)), None)
            if same is None:
                groups.append((x, active, [name]))
            else:
                same.append(name)
        for x, active, names in groups:
            for cell in self._cells_of(names):
                for kind in self.kinds:
                    accumulate(kind, cell.sums[kind], x, active)

    def _cells_of(self, names: list[str]) -> Iterable[_Cell]:
        """The cells of these layers and of no other, split from those of layers that now differ from them."""
        new = [name for name in names if name not in self.cells]
        if new:
            self._assign(new, self._zeros(new[0]))
        for cell in {self.cells[name]: None for name in names}:
            if not cell.members <= set(names):
                mine = cell.members & set(names)
                cell.members -= mine
                self._assign(mine, {kind: total.clone() for kind, total in cell.sums.items()})
        return {self.cells[name]: None for name in names}

    def _assign(self, names: Iterable[str], sums: dict[str, Tensor]) -> None:
        cell = _Cell(set(names), sums)
        self.cells |= dict.fromkeys(cell.members, cell)

    def _zeros(self, name: str) -> dict[str, Tensor]:
        target = self.targets[name]
        device = self.device or sums_device(target)
        return {kind: torch.zeros(sum_shape(kind, target), device=device) for kind in self.kinds}
