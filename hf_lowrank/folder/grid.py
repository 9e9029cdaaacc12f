"""Layer names → a grid of blocks and layer types, and a heat map with a number in every cell."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_lowrank.folder.style import SEQUENTIAL, new_figure
from hf_lowrank.model.layer_names import place_of

CELL_WIDTH, CELL_HEIGHT = 0.92, 0.24  # inches
APART = "#F2F2F2"
# The darkest end is cut off: text would not stand out on it.
COLOURS = LinearSegmentedColormap.from_list("cells", [colormaps[SEQUENTIAL](0.9 * n / 31) for n in range(32)])
OUTSIDE = "–"  # the block of a layer outside of all blocks, such as a pooler


@dataclass(frozen=True)
class Grid:
    """Where every layer stands: its row is its block, its column its type (its name within the block)."""

    blocks: tuple[str, ...]
    types: tuple[str, ...]
    cells: dict[str, tuple[int, int]]  # layer → (row, column)


@dataclass(frozen=True)
class Cell:
    """What a cell shows. `value` gives its colour; None is a hatched one, for what is apart from the scale."""

    value: float | None
    text: str


def grid_of(names: Iterable[str]) -> Grid:
    """Sort layers into blocks and types; where blocks of the same number exist twice, types say which is meant.

    >>> grid = grid_of(["h.0.attn.q", "h.0.mlp", "h.1.mlp"])
    >>> grid.blocks, grid.types, grid.cells["h.1.mlp"]
    (('0', '1'), ('attn.q', 'mlp'), (1, 1))
    """
    places = {name: place_of(name) for name in names}
    blocks = sorted({place.block for place in places.values()}, key=lambda block: (block is None, block or 0))
    shared = _shared_parts([place.before for place in places.values() if place.block is not None])
    labels = {name: ": ".join([*place.before[shared : shared + 1], place.within]) for name, place in places.items()}
    types = list(dict.fromkeys(labels.values()))
    cells = {name: (blocks.index(place.block), types.index(labels[name])) for name, place in places.items()}
    return Grid(tuple(OUTSIDE if block is None else str(block) for block in blocks), tuple(types), cells)


def heat_map(cells: Mapping[str, Cell], title: str, scale_label: str, norm: Normalize) -> Figure:
    """Layers as a grid of blocks (rows) and types (columns), coloured by value, each with its text.

    Every cell has the same size in inches whatever their number, so that 48 blocks are as readable as 6.
    """
    grid = grid_of(cells)
    longest = max(len(kind) for kind in grid.types)
    width = max(5.2, 1.7 + CELL_WIDTH * len(grid.types))
    figure = new_figure(width, 1.25 + 0.052 * longest + CELL_HEIGHT * len(grid.blocks))
    axes = figure.add_subplot()
    for name, cell in cells.items():
        _draw(axes, *grid.cells[name], cell, None if cell.value is None else COLOURS(float(norm(cell.value))))
    axes.set_xlim(0, len(grid.types))
    axes.set_ylim(len(grid.blocks), 0)
    axes.set_xticks([n + 0.5 for n in range(len(grid.types))], grid.types, rotation=35, ha="right")
    axes.set_yticks([n + 0.5 for n in range(len(grid.blocks))], grid.blocks)
    axes.set_ylabel("block")
    axes.set_title(title, wrap=True)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(
        ScalarMappable(norm, COLOURS),
        ax=axes,
        label=scale_label,
        shrink=0.9,
        aspect=max(8, 2 * len(grid.blocks)),
        pad=0.02,
    )
    return figure


def log_norm(values: Iterable[float], decades: float = 4.0) -> Normalize:
    """A logarithmic scale up to the largest value, over at most so many decades, whatever is below counting as its end.

    All zero: a linear scale.
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return Normalize(0, 1)
    highest = max(positive)
    lowest = max(min(positive), highest / 10**decades)
    return LogNorm(lowest if lowest < highest else highest / 10, highest, clip=True)


def _draw(axes: Axes, row: int, column: int, cell: Cell, colour: tuple[float, float, float, float] | None) -> None:
    apart = {"facecolor": APART, "hatch": "////", "edgecolor": "#CCCCCC"}
    look = apart if colour is None else {"facecolor": colour}
    axes.add_patch(Rectangle((column, row), 1, 1, linewidth=0, **look))
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="white", linewidth=1.2))
    red, green, blue = to_rgb(APART if colour is None else colour)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
    axes.text(column + 0.5, row + 0.5, cell.text, ha="center", va="center", fontsize=7.5, color="w" if dark else "k")


def _shared_parts(stems: list[tuple[str, ...]]) -> int:
    """How many parts all stems begin with: from there on they tell an encoder from a decoder."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*stems, strict=False)))
