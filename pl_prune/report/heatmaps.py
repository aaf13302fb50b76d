"""Figures of what the masks left: density by layer, collapse, and how far the rows' masks agree."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan, prod
from statistics import mean
from typing import TYPE_CHECKING, Any

from pl_prune.core.masks import MaskSet
from pl_prune.report.canvas import INK, Picture, draw
from pl_prune.report.cells import cells, linear, tall, ticks, write
from pl_prune.report.grid import Group, Run, Study
from pl_prune.report.scored import MASKS, read_masks
from pl_prune.report.sparsity import BOTTLENECK
from pl_prune.report.words import abbreviate, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 6


def density_figures(study: Study) -> list[Picture]:
    """Draw the density of every layer under every row, at the sparsest and at the densest point.

    Args:
        study: The study.

    Returns:
        At most two figures; none where no run has a report.
    """
    found = []
    for number, point in enumerate(study.shown):
        groups = [g for g in study.at(point) if any(run.layers for run in g.runs)]
        layers = list(dict.fromkeys(layer["name"] for g in groups for run in g.runs for layer in run.layers))
        if layers:
            found.append((number, point, groups, layers, [[_density(g, name) for g in groups] for name in layers]))
    low = min((v for *_, table in found for line in table for v in line if v > 0), default=0.01)
    low = min(max(low, 1e-4), 0.5)
    figures = []
    for number, point, groups, layers, table in found:
        title = f"Density of each layer at {study.label(point)}"
        caption = (
            "Look for dark cells, where little is kept (% of the layer's entries, or of its units where those were sliced off; mean "
            "over seeds; log scale), "
            "and for crosses, where nothing is."
        )

        def paint(figure: Figure, table: Any = table, groups: Any = groups, layers: Any = layers) -> None:
            from matplotlib.colors import LogNorm

            axes = figure.add_subplot()
            norm = LogNorm(low, 1)
            mesh = cells(axes, table, norm, "cividis")
            ticks(axes, [g.cell.row for g in groups], layers)
            for y, line in enumerate(table):
                for x, value in enumerate(line):
                    if value == 0:
                        axes.plot(x, y, "x", color="#D55E00", markersize=6, markeredgewidth=2)
                    elif len(groups) <= 8 and not isnan(value):
                        dark = norm(value) < 0.55
                        text = f"{100 * value:.2g}" if value < 0.995 else "100"
                        write(axes, x, y, text, "white" if dark else "black")
            marks = [low, *(t for t in (1e-3, 0.01, 0.03, 0.1, 0.3, 1) if t > 1.5 * low)]
            bar = figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.02, ticks=marks)
            bar.ax.set_yticklabels([f"{100 * tick:.2g}" if tick < 1 else "100" for tick in marks])
            bar.ax.minorticks_off()
            bar.set_label("density (%)")

        figures.append(
            draw(f"density_{number + 1}", title, caption, tall(len(layers), [g.cell.row for g in groups]), paint)
        )
    return figures


def collapse_figure(study: Study) -> Picture | None:
    """Draw collapsed layers, bottlenecks and empty output channels of every row at every point.

    Args:
        study: The study.

    Returns:
        The figure; None where no run has a report.
    """
    points = [p for p in study.points if any(run.layers for g in study.at(p) for run in g.runs)]
    if not points:
        return None
    step = max(1, -(-len(points) // _POINTS))
    points = points[::-1][::step][::-1]
    rows = [row for row in study.rows if any(g.cell.row == row for p in points for g in study.at(p))]
    panels = (
        ("collapsed layers\n(count)", lambda layers: float(sum(x["kept"] == 0 for x in layers))),
        (
            "bottlenecks\n(count)",
            lambda layers: float(
                sum(x["kept"] > 0 and x["total"] - x["kept"] >= BOTTLENECK * x["total"] for x in layers)
            ),
        ),
        ("empty output\nchannels (%)", _empty),
    )

    def paint(figure: Figure) -> None:
        every = figure.subplots(1, 3, sharey=True)
        for axes, (title, measure) in zip(every, panels, strict=True):
            found = {(row, i): nan for row in rows for i in range(len(points))}
            for i, point in enumerate(points):
                for group in study.at(point):
                    value = group.average(lambda run, m=measure: m(run.layers) if run.layers else None)  # type: ignore[misc]
                    found[group.cell.row, i] = nan if value is None else value
            table = [[found[row, i] for i in range(len(points))] for row in rows]
            top = max((1, *(v for line in table for v in line if not isnan(v))))
            cells(axes, table, linear(top), "Blues")
            for (row, i), value in found.items():
                color = INK if isnan(value) else "white" if value > 0.6 * top else "black"
                write(axes, i, rows.index(row), _short(value), color)
            axes.set_title(title)
            ticks(axes, [_tick(study, p) for p in points], rows, room=14)
        every[1].set_xlabel(abbreviate(study.short(study.axis), 40) if study.axis else "point of the grid")

    caption = (
        "Look for numbers above zero: a collapsed layer has nothing left, a bottleneck lost at least "
        f"{BOTTLENECK:.0%}, an empty output channel computes a constant or is gone (means over seeds)."
    )
    names = [abbreviate(_tick(study, p), 14) for p in points]
    return draw(
        "collapse", "Collapse and bottlenecks", caption, 1.2 + 0.2 * len(rows) + 0.06 * max(map(len, names)), paint
    )


def agreement_figure(study: Study) -> Picture | None:
    """Draw how far the masks of the rows agree at the sparsest point.

    Args:
        study: The study.

    Returns:
        The figure; None where fewer than two rows have masks.
    """
    point = study.shown[0] if study.shown else {}
    groups: list[Group] = []
    masks: list[MaskSet] = []
    kept: list[int] = []
    table: list[list[float]] = []
    for group in study.at(point):
        own = [read_masks(run) for run in group.runs if (run.folder / MASKS).is_file()][:2]
        if own:
            groups.append(group)
            kept.append(_kept(own[0]))
            line = [overlap(own[0], other, kept[-1] + n) for other, n in zip(masks, kept, strict=False)]
            table.append([*line, overlap(own[0], own[1]) if len(own) > 1 else nan])
            masks.append(own[0])
    if len(groups) < 2:
        return None
    for i, line in enumerate(table):
        line.extend(table[j][i] for j in range(i + 1, len(table)))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = [g.cell.row for g in groups]
        mesh = cells(axes, table, linear(1), "cividis")
        ticks(axes, rows, rows)
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if not isnan(value) and len(groups) <= 10:
                    color = "white" if value < 0.55 else "black"
                    write(axes, x, y, f"{value:.2f}", color)
        figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.02).set_label("IoU (0 to 1)")

    density = mean(1 - (g.average(lambda run: run.record.get("sparsity")) or 0) for g in groups)
    caption = (
        "Look for bright pairs, whose masks keep the same weights (intersection over union; first seed of each row; "
        f"the diagonal compares two seeds of one row): masks drawn at random would have about {density / (2 - density):.2f}."
    )
    return draw(
        "agreement",
        f"Agreement of masks at {study.label(point)}",
        caption,
        tall(len(groups), [g.cell.row for g in groups]),
        paint,
    )


def _density(group: Group, name: str) -> float:
    def of(run: Run) -> float | None:
        return next((float(x["kept"] / max(x["total"], 1)) for x in run.layers if x["name"] == name), None)

    value = group.average(of)
    return nan if value is None else value


def _short(value: float) -> str:
    if isnan(value):
        return "-"
    if 0 < value < 0.05:
        return "<.1"
    return f"{value:.0f}" if value >= 10 or value % 1 == 0 else f"{value:.1f}"


def _empty(layers: Sequence[dict[str, Any]]) -> float:
    channels = sum(x["shape"][0] for x in layers if x["shape"])
    return float(100 * sum(x["empty_rows"] for x in layers) / max(channels, 1))


def _tick(study: Study, point: dict[str, Any]) -> str:
    return show(point[study.axis]) if study.axis and len(point) == 1 else ", ".join(map(show, point.values())) or "all"


def overlap(one: MaskSet, other: MaskSet, kept: int | None = None) -> float:
    """Compare what two masks keep.

    Args:
        one: Masks.
        other: Masks.
        kept: Entries that the first and that the second keep, in sum, where that has been counted already.

    Returns:
        Intersection over union, in [0, 1]; NaN for two architectures.
    """
    if one.shapes() != other.shapes():
        return nan
    total = sum(prod(shape) for shape in one.shapes().values())
    kept = _kept(one) + _kept(other) if kept is None else kept
    odd = round(one.hamming(other) * total)
    return (kept - odd) / (kept + odd) if kept else 1.0


def _kept(masks: MaskSet) -> int:
    return sum(kept for kept, _ in masks.counts().values())
