"""The ranks chosen for a model's layers → a heat map of where the model carries information."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hf_lowrank.folder.grid import Cell, heat_map
from hf_lowrank.folder.style import styled
from hf_lowrank.model.layer_names import is_expert_layer


@styled
def ranks_figure(layers: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Chosen ranks by block and layer type, as a share of the full rank, dense layers hatched.

    The experts of a block share a cell for each projection: their least and greatest rank, and the mean share.

    Args:
        layers: name → {"out": int, "in": int, "rank": int, or None for a dense layer}, as in `inspect()["layers"]`.

    Raises:
        ValueError: there are no layers.
    """
    if not layers:
        raise ValueError("there are no layers to draw")
    together: dict[str, list[Mapping[str, Any]]] = {}
    for name, layer in layers.items():
        together.setdefault(name.rpartition(".")[0] if is_expert_layer(name) else name, []).append(layer)
    cells = {name: _cell(members) for name, members in together.items()}
    shares = [cell.value for cell in cells.values() if cell.value is not None]
    title = "Rank kept in each layer, and its share of min(out, in)"
    return heat_map(cells, title, "share of the full rank (%)", Normalize(0, max(shares, default=100)))


def _cell(layers: Sequence[Mapping[str, Any]]) -> Cell:
    ranks = [layer["rank"] for layer in layers if layer["rank"] is not None]
    if not ranks:
        return Cell(None, "dense")
    full = [min(layer["out"], layer["in"]) for layer in layers]
    share = mean(100 * (layer["rank"] or most) / most for layer, most in zip(layers, full, strict=True))
    greatest = "dense" if len(ranks) < len(layers) else max(ranks)
    shown = f"{ranks[0]}" if min(ranks) == greatest else f"{min(ranks)}–{greatest}"
    return Cell(share, f"{shown} · {share:.0f}%")
