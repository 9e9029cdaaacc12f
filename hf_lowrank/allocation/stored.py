"""A layer's shape, its ranks and bits → what each costs in bytes, and with its losses, the choices of an allocation."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hf_lowrank.allocation.choices import Choices
from hf_lowrank.allocation.costs import Shape

BITS = (8, 4)  # of a weight
GROUP = 32  # weights in a row that share a scale of 4 bits, where rows divide into such groups; vLLM's smallest


@dataclass(frozen=True)
class Stored:
    """How a layer is kept: its rank, None for as it is, and the bits of a weight."""

    rank: int | None
    bits: int


@dataclass(frozen=True)
class Packed:
    """What the bytes of a layer depend on.

    Args:
        shape: (out, in) of its weight.
        lookup: whether it is an embedding.
        scale_bytes: of a scale, and of a number that is not rounded.
        dense: the bytes of the weight where it cannot be rounded, such as that of a Conv1D; factors always can.
    """

    shape: Shape
    lookup: bool = False
    scale_bytes: int = 2
    dense: int | None = None

    def bytes(self, stored: Stored) -> int:
        """The bytes of the weight, or of its factors.

        Those of an embedding have a row for each token, and its `up`, which a head might share, is not rounded.
        """
        outputs, inputs = self.shape
        if stored.rank is None and self.dense is not None:
            return self.dense
        if stored.rank is None:
            return self.matrix(*((inputs, outputs) if self.lookup else (outputs, inputs)), stored.bits)
        if self.lookup:
            return self.matrix(inputs, stored.rank, stored.bits) + outputs * stored.rank * self.scale_bytes
        return self.matrix(stored.rank, inputs, stored.bits) + self.matrix(outputs, stored.rank, stored.bits)

    def matrix(self, rows: int, width: int, bits: int) -> int:
        """The bytes of a matrix [rows, width], scales included; every row is whole words of 32 bits."""
        groups = width // (group_of(width, bits) or width)
        return rows * (-(-width * bits // 32) * 4 + groups * self.scale_bytes)


def group_of(width: int, bits: int) -> int | None:
    """How many weights of a row of this width share a scale; None for all of them."""
    return GROUP if bits < 8 and width % GROUP == 0 else None


def byte_choices(
    packed: Packed, ranks: Iterable[int], loss: Callable[[Stored], float], bits: Iterable[int] = BITS
) -> tuple[Choices, list[Stored]]:
    """The choices that no other beats in bytes and loss at once, cheapest first, and what each of them stands for."""
    every = [Stored(rank, own) for rank in (*ranks, None) for own in bits]
    priced = sorted((packed.bytes(stored), loss(stored), number) for number, stored in enumerate(every))
    kept = [priced[0]]
    for choice in priced:
        if choice[1] < kept[-1][1]:
            kept.append(choice)
    chosen = [every[number] for _, _, number in kept]
    costs, losses = tuple(float(cost) for cost, _, _ in kept), tuple(lost for _, lost, _ in kept)
    return Choices(packed.shape, tuple(stored.rank for stored in chosen), costs, losses), chosen
