"""Tables of coloured cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pl_prune.report.canvas import PAPER, WIDTH
from pl_prune.report.words import apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def cells(axes: Axes, table: Sequence[Sequence[float]], norm: Any, colors: str) -> Any:
    """Colour the cells of a table, the first line on top.

    Args:
        axes: Where.
        table: Lines of values; NaN leaves a cell empty.
        norm: From values to [0, 1].
        colors: Name of the colour map.

    Returns:
        What a colour bar takes.
    """
    xs, ys = ([place - 0.5 for place in range(size + 1)] for size in (len(table[0]), len(table)))
    mesh = axes.pcolormesh(xs, ys, table, norm=norm, cmap=colors, edgecolors=PAPER, linewidth=0.8)
    axes.set_xlim(-0.5, len(table[0]) - 0.5)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def write(axes: Axes, column: int, line: int, text: str, color: str) -> None:
    """Write into a cell; the layout need not measure what lies inside the table.

    Args:
        axes: Whose.
        column: From 0.
        line: From 0.
        text: A few letters.
        color: Of the text.
    """
    axes.text(column, line, text, color=color, ha="center", va="center", size=7).set_in_layout(False)


def linear(top: float, bottom: float = 0) -> Any:
    """Return even colours.

    Args:
        top: Highest value.
        bottom: Lowest value.

    Returns:
        From values to [0, 1].
    """
    from matplotlib.colors import Normalize

    return Normalize(bottom, top)


def ticks(axes: Axes, across: Sequence[str], down: Sequence[str], room: int = 44) -> None:
    """Name the columns and lines of a table.

    Args:
        axes: Whose.
        across: Columns.
        down: Lines.
        room: Letters that fit side by side; more are turned upright.
    """
    short = apart(across, 14)
    turned = max(map(len, short), default=0) * len(short) > room
    axes.set_xticks(range(len(short)), short, rotation=90 if turned else 0)
    axes.set_yticks(range(len(down)), apart(down, 24))


def tall(lines: int, columns: Sequence[str]) -> float:
    """Return how high a figure of a table is.

    Args:
        lines: How many.
        columns: Their names.

    Returns:
        Inches.
    """
    return min(1.1 + 0.2 * max(lines, 4) + 0.06 * max(min(len(name), 14) for name in columns), 4 * WIDTH)
