"""Sums that depend on a layer's input alone: one for all layers that read the same tokens, as q, k and v do."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.jobs.distributed import from_everyone, summed
from hf_lowrank.model.targets import Target
from hf_lowrank.statistics.kinds import accumulate, active_tokens, completed, sum_shape


@dataclass(eq=False)
class _Cell:
    """The sums by kind that some layers have in common, up to now."""

    members: set[str]
    sums: dict[str, Tensor]


class InputSums:
    """Sums of the kinds that only inputs decide (`Kind.of_input`), once for layers that always read the same inputs.

    Whether they do is a matter of which tensors they were called with, and no matter of numbers. A token counts for all
    targeted layers that read it, or for none: it is active if the loss depends on what any of them makes of it.
    """

    def __init__(self, kinds: Sequence[str], targets: dict[str, Target], devices: Mapping[str, torch.device]) -> None:
        self.kinds, self.targets, self.devices = kinds, targets, devices
        self.cells: dict[str, _Cell] = {}
        self.waiting: dict[Hashable, tuple[tuple[str, ...], Tensor, list[Tensor]]] = {}
        self.active: dict[str, Tensor] = {}  # which tokens are, [batch, tokens] by layer, of the batch at hand

    def arrive(self, key: Hashable, readers: tuple[str, ...], x: Tensor, largest: Tensor) -> None:
        """Take the input `key`, x [batch, tokens, in], and what one reader's gradient is at most [batch, tokens].

        It is added up when all of `readers`, the layers that read this input, have arrived, or the batch has ended.
        """
        _, _, arrived = self.waiting.setdefault(key, (readers, x, []))
        arrived.append(largest)
        if len(arrived) == len(readers):
            self._add(*self.waiting.pop(key))

    def end_batch(self) -> None:
        """Add up what still waits for layers that got no gradient."""
        for arrived in self.waiting.values():
            self._add(*arrived)
        self.waiting.clear()

    def state(self) -> tuple[dict[str, Tensor], list[list[str]]]:
        """The sums up to now between two batches, by cell and kind, and the members of every cell."""
        cells = list({self.cells[name]: None for name in self.targets if name in self.cells})
        sums = {f"{n}/{kind}": cell.sums[kind] for n, cell in enumerate(cells) for kind in self.kinds}
        return sums, [sorted(cell.members) for cell in cells]

    def restore(self, sums: dict[str, Tensor], members: list[list[str]]) -> None:
        """Go on from a `state`."""
        for n, names in enumerate(members):
            device = self.devices[names[0]]
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
        """For each layer the number of its cell on each process, -1 without one, and its own number if it has none."""
        numbers: dict[_Cell, int] = {}
        for name in self.targets:
            if name in self.cells:
                numbers.setdefault(self.cells[name], len(numbers))
        everyone = from_everyone({name: numbers[cell] for name, cell in self.cells.items()})
        labels = {name: tuple(numbers.get(name, -1) for numbers in everyone) for name in self.targets}
        return {
            name: label if any(number >= 0 for number in label) else (*label, n)
            for n, (name, label) in enumerate(labels.items())
        }

    def _add(self, readers: tuple[str, ...], x: Tensor, arrived: list[Tensor]) -> None:
        """Add an input, its tokens active if they are for any reader, to the sums of all its readers."""
        active = active_tokens(torch.stack([largest.to(x.device) for largest in arrived]).amax(dim=0))
        self.active |= dict.fromkeys(readers, active.bool())
        x = x.float() if x.is_floating_point() else x
        for cell in self._cells_of(readers):
            for kind in self.kinds:
                accumulate(kind, cell.sums[kind], x, active)

    def _cells_of(self, names: Sequence[str]) -> Iterable[_Cell]:
        """The cells of these layers and of no other, split from those of layers that now read something else."""
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
        shapes = {kind: sum_shape(kind, self.targets[name]) for kind in self.kinds}
        return {kind: torch.zeros(shape, device=self.devices[name]) for kind, shape in shapes.items()}
