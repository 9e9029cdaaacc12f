"""The ranks chosen for a model's layers → a heat map of where the model carries information."""

from collections.abc import Mapping
from typing import Any

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hf_lowrank.plots.grid import Cell, heat_map
from hf_lowrank.plots.style import styled


@styled
def ranks_figure(layers: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Chosen ranks by block and layer type, as a share of the full rank, dense layers hatched.

    Args:
        layers: name → {"out": int, "in": int, "rank": int, or None for a dense layer}, as in `inspect()["layers"]`.

    Raises:
        ValueError: there are no layers.
    """
    if not layers:
        raise ValueError("there are no layers to draw")
    cells = {name: _cell(layer) for name, layer in layers.items()}
    shares = [cell.value for cell in cells.values() if cell.value is not None]
    title = "Rank kept in each layer, and its share of min(out, in)"
    return heat_map(cells, title, "share of the full rank (%)", Normalize(0, max(shares, default=100)))


def _cell(layer: Mapping[str, Any]) -> Cell:
    if layer["rank"] is None:
        return Cell(None, "dense")
    share = 100 * layer["rank"] / min(layer["out"], layer["in"])
    return Cell(share, f"{layer['rank']} · {share:.0f}%")
