"""Group truncations → bars of the damage that each group does, by method, and its reconstruction error beneath."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from hf_lowrank.folder.style import BLACK, GREY, method_style, new_figure, styled
from hf_lowrank.studies.analysis import GroupTruncation

COLUMNS = 4


@styled
def truncation_figure(truncations: Sequence[GroupTruncation], damage_unit: str) -> Figure:
    """One column for each method, at most four side by side; every row of panels has one scale.

    Raises:
        ValueError: there are none.
    """
    if not truncations:
        raise ValueError("there are no group truncations to draw")
    columns = min(COLUMNS, len(truncations))
    rows = -(-len(truncations) // columns)
    figure = new_figure(max(4.0, 0.7 + 2.25 * columns), 0.5 + 4.0 * rows)
    heights = [2, 1] * rows
    axes = figure.subplots(2 * rows, columns, squeeze=False, sharex=True, sharey="row", height_ratios=heights)
    for n in range(rows * columns):
        above, below = axes[2 * (n // columns)][n % columns], axes[2 * (n // columns) + 1][n % columns]
        if n >= len(truncations):
            above.set_visible(False)
            below.set_visible(False)
            continue
        _damage(above, truncations[n])
        _reconstruction(below, truncations[n])
        if n % columns == 0:
            above.set_ylabel(f"damage\n({damage_unit})")
            below.set_ylabel("reconstruction\nerror ‖Δ‖ / ‖W‖")
    bar = Patch(color=GREY, label="measured, ± standard error")
    line = Line2D([], [], color=BLACK, linestyle=":", marker=".", label="ideal: the same damages, falling")
    figure.legend(handles=[bar, line], loc="outside lower center", ncols=min(2, columns))
    figure.suptitle("Damage of removing one group of\nsingular directions from all layers at once", fontsize=10)
    return figure


def _damage(axes: Axes, truncation: GroupTruncation) -> None:
    index = [group.group for group in truncation.groups]
    damage = [group.measured.damage for group in truncation.groups]
    errors = [group.measured.damage_error for group in truncation.groups]
    colour = method_style(truncation.method)["color"]
    whiskers = {"elinewidth": 0.9, "ecolor": GREY}
    axes.bar(index, damage, 0.75, yerr=errors, color=colour, error_kw=whiskers)
    axes.plot(index, truncation.ideal, color=BLACK, linestyle=":", marker=".")
    axes.axhline(0, color=BLACK, linewidth=0.6)
    order = "–" if truncation.monotonicity is None else f"{truncation.monotonicity:.2f}"
    first = "–" if truncation.concentration is None else f"{truncation.concentration:.0%}"
    axes.set_title(f"{truncation.method}\nmonotonicity {order}\nin the first third {first}", fontsize=9)


def _reconstruction(axes: Axes, truncation: GroupTruncation) -> None:
    index = [group.group for group in truncation.groups]
    look = method_style(truncation.method)
    axes.plot(index, [group.reconstruction_error for group in truncation.groups], color=look["color"], marker="o")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks(index if len(index) <= 10 else index[:: -(-len(index) // 10)])
    axes.set_xlabel("group (1: kept first)")
