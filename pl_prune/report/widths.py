"""Figures of how many output channels each layer has left."""

from __future__ import annotations

from math import isnan, nan
from statistics import mean
from typing import TYPE_CHECKING, Any

from pl_prune.report.canvas import INK, Picture, draw, look
from pl_prune.report.cells import cells, linear, tall, ticks, write
from pl_prune.report.grid import Group, Run, Study
from pl_prune.report.words import apart, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ABOUT = "a channel is left where the mask keeps any of its entries, or where it was not sliced off"


def width_figure(study: Study) -> Picture | None:
    """Draw the output channels that every row leaves of every layer at the sparsest point.

    Args:
        study: The study.

    Returns:
        The figure; None where no run has a report.
    """
    point = study.shown[0] if study.shown else {}
    groups = [g for g in study.at(point) if any(run.layers for run in g.runs)]
    before = {x["name"]: _before(x) for g in groups for run in g.runs for x in _producing(run.layers)}
    if not before:
        return None
    table = [[_left(g, name) for g in groups] for name in before]
    rows = [g.cell.row for g in groups]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        shares = [[v / max(size, 1) for v in line] for line, size in zip(table, before.values(), strict=True)]
        mesh = cells(axes, shares, linear(1), "cividis")
        labels = apart(list(before), 18)
        ticks(axes, rows, [f"{label} ({size})" for label, size in zip(labels, before.values(), strict=True)])
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if len(groups) <= 8 and not isnan(value):
                    color = "white" if shares[y][x] < 0.55 else "black"
                    write(axes, x, y, f"{value:.4g}", color)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.02, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
        bar.set_label("channels left (%)")

    lost = [
        100 * mean(1 - v / max(size, 1) for v, size in zip(column, before.values(), strict=True) if not isnan(v))
        for column in zip(*table, strict=True)
    ]
    words = listed([f"{row} {share:.2g} %" for row, share in zip(rows, lost, strict=True) if share])
    said = f"Channels lost, mean over layers: {words}" if words else "No row lost a whole channel of any layer"
    caption = f"{said}; {_ABOUT}. Cells hold how many are left, the names of layers how many there were."
    return draw("widths", f"Widths at {study.label(point)}", caption, tall(len(before), rows), paint)


def run_width_figure(run: Run) -> Picture | None:
    """Draw the output channels of each layer before and after.

    Args:
        run: The run.

    Returns:
        The figure; None where the run has no report.
    """
    if not run.layers:
        return None
    layers = _producing(run.layers)
    before = [_before(x) for x in layers]
    after = [size - x["empty_rows"] for size, x in zip(before, layers, strict=True)]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(range(len(before)), before, facecolor="none", edgecolor=INK, linewidth=0.8, height=0.75)
        axes.barh(range(len(after)), after, color=look(0)["color"], height=0.75)
        for place, (size, left) in enumerate(zip(before, after, strict=True)):
            axes.text(size + 0.01 * max(before), place, f"{left} of {size}", va="center", size=7.5)
        axes.set_yticks(range(len(before)), apart([x["name"] for x in layers], 28))
        axes.set_ylim(len(before) - 0.4, -0.6)
        axes.set_xlim(0, 1.22 * max(before))
        axes.set_xlabel("output channels")
        axes.grid(axis="x", alpha=0.2)

    gone = sum(before) - sum(after)
    said = (
        f"{gone} of {sum(before)} output channels are gone" if gone else f"All {sum(before)} output channels are left"
    )
    return draw("widths", "Widths before and after", f"{said}: {_ABOUT}.", 0.9 + 0.2 * max(len(before), 2), paint)


def _producing(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out norms and biases, where weights are there: their channels are those of the weight before them."""
    return [x for x in layers if len(x["shape"]) > 1] or layers


def _before(layer: dict[str, Any]) -> int:
    return int(layer["shape"][0]) if layer["shape"] else 1


def _left(group: Group, name: str) -> float:
    def of(run: Run) -> float | None:
        return next((float(_before(x) - x["empty_rows"]) for x in run.layers if x["name"] == name), None)

    value = group.average(of)
    return nan if value is None else value
