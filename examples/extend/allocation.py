"""An allocation of one's own: every layer keeps the same share of its spectrum's sum, its "energy"."""

from hf_lowrank.allocation.choices import Choices, total_cost
from hf_lowrank.allocation.rules import allocation


@allocation("energy", "the same share of its spectrum for every layer", losses="spectrum")
def energy(choices: dict[str, Choices], budget: float) -> dict[str, int]:
    """The largest share, in thousandths, that fits the budget: name → index of the layer's choice."""
    for share in range(1000, -1, -1):
        chosen = {name: _at_share(layer, share / 1000) for name, layer in choices.items()}
        if total_cost(choices, chosen) <= budget:
            return chosen
    return dict.fromkeys(choices, 0)


def _at_share(layer: Choices, share: float) -> int:
    """The first choice, ranks ascending and dense last, that loses no more than the rest of the share."""
    allowed = (1 - share) * sum(layer.spectrum)
    return next((n for n, lost in enumerate(layer.losses) if lost <= allowed), len(layer.losses) - 1)
