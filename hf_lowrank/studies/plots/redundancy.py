"""Layers' shares of the expected loss → a heat map of what is redundant in a model and what is not."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from hf_lowrank.folder.grid import Cell, heat_map, log_norm
from hf_lowrank.folder.style import styled
from hf_lowrank.studies.analysis import LayerAnalysis


@styled
def redundancy_figure(layers: Sequence[LayerAnalysis], rank_ratio: float) -> Figure:
    """The share of the whole expected loss increase that each layer carries at a rank ratio; light is redundant."""
    cells = {layer.name: Cell(100 * layer.share, _percent(layer.share)) for layer in layers}
    title = f"Where the expected loss is, with {rank_ratio:.0%} of the ranks everywhere"
    norm = log_norm([100 * layer.share for layer in layers], decades=3)
    return heat_map(cells, title, "share of the expected\nloss increase (%)", norm)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share >= 1e-4 else "<0.01%"
