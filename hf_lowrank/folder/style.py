"""One look for all plots: sizes, fonts, colours that colour-blind people can tell apart; a figure → PNG, file or HTML.

Figures are made without pyplot, so that plotting leaves no global state and needs no display.
"""

import base64
import io
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lowrank.jobs.files import write_bytes

WIDTH, HEIGHT = 7.0, 4.2  # inches
DPI = 130

# Okabe & Ito (2008), "Color Universal Design".
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#7F7F7F"

SEQUENTIAL = "Blues"  # light to dark: readable in grey as well

# A method looks the same in every plot. There are more of them than colours: close relatives share one, and differ in
# line and marker.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "svd": {"color": VERMILLION, "marker": "o", "linestyle": "-"},
    "fwsvd": {"color": ORANGE, "marker": "s", "linestyle": "-"},
    "fwsvd2": {"color": ORANGE, "marker": "D", "linestyle": "--"},
    "tfwsvd": {"color": PURPLE, "marker": "^", "linestyle": "-"},
    "asvd": {"color": YELLOW, "marker": "v", "linestyle": "-"},
    "whiten": {"color": SKY, "marker": "P", "linestyle": "-"},
    "whiten-diag": {"color": SKY, "marker": "X", "linestyle": "--"},
    "kfac": {"color": BLUE, "marker": "D", "linestyle": "-"},
    "gfwsvd": {"color": BLUE, "marker": "h", "linestyle": "--"},
    "ekfac": {"color": GREEN, "marker": "p", "linestyle": "-"},
}
DENSE_STYLE: dict[str, Any] = {"color": BLACK, "linestyle": ":", "linewidth": 1.5}

_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}

P = ParamSpec("P")


def styled(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a function that makes a figure: it draws with this module's fonts and lines."""

    @wraps(plot)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(_RC):  # type: ignore[arg-type]
            return plot(*args, **kwargs)

    return wrapper


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure of a size in inches, whose parts are laid out so that they do not overlap."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def method_style(method: str) -> dict[str, Any]:
    """Colour, marker and line of a method's curve, as arguments of `Axes.plot`; grey for one not known here."""
    return METHOD_STYLES.get(method, {"color": GREY, "marker": ".", "linestyle": "-."})


def legend_beside(axes: Axes, **options: Any) -> None:
    """A legend to the right of the plot, where it covers no data."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **options)


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save_png(figure: Figure | bytes, path: str | Path) -> None:
    """Write a figure, or what `png_bytes` made of it, as a PNG, whole or not at all."""
    write_bytes(Path(path), figure if isinstance(figure, bytes) else png_bytes(figure))


def data_uri(figure: Figure | bytes) -> str:
    """A figure, or its PNG, as a data URI, for <img src=…> in a page that needs no other file."""
    png = figure if isinstance(figure, bytes) else png_bytes(figure)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
