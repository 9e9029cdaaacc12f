"""Figures from plain records and dataclasses: nothing here measures anything."""

from hf_lowrank.plots.ranks import ranks_figure
from hf_lowrank.plots.style import data_uri, save_png

__all__ = ["data_uri", "ranks_figure", "save_png"]
