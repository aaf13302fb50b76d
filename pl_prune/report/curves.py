"""Figures of training, and of a single run."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import mean
from typing import TYPE_CHECKING, Any

from pl_prune.report.canvas import INK, Picture, band, draw, legend, legend_height, look
from pl_prune.report.grid import Run, Study
from pl_prune.report.words import abbreviate, apart, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EPOCHS = 120
_MARKS = 8


def curve_figures(study: Study) -> list[Picture]:
    """Draw the metric over the epochs for every row, at the sparsest and at the densest point.

    Args:
        study: The study.

    Returns:
        At most two figures; none where no run logged the metric.
    """
    figures = []
    for number, point in enumerate(study.shown):
        lines = {g.cell.row: _over_seeds(g.runs, study.metric) for g in study.at(point)}
        lines = {row: line for row, line in lines.items() if line}
        if not lines:
            continue
        if study.dense is not None and (line := _over_seeds(study.dense.runs, study.metric)):
            lines[study.dense.cell.row] = line
        labels = apart(list(lines), 28)
        several = any(len(values) > 1 for line in lines.values() for _, values in line)

        def paint(figure: Figure, lines: Any = lines, labels: Any = labels) -> None:
            axes = figure.add_subplot()
            handles = []
            for row, line in lines.items():
                dense = study.dense is not None and row == study.dense.cell.row
                own = {"color": INK, "linestyle": (0, (6, 2)), "marker": ""} if dense else look(study.rows.index(row))
                style = {**own, "markevery": max(1, len(line) // _MARKS)}
                xs = [epoch for epoch, _ in line]
                middle = [mean(values) for _, values in line]
                band(axes, xs, middle, [spread(values) for _, values in line], style["color"])
                handles += axes.plot(xs, middle, **style)
            axes.set_xlabel("epoch")
            axes.locator_params("x", integer=True)
            axes.set_ylabel(abbreviate(study.metric, 44))
            axes.grid(alpha=0.2)
            legend(figure, axes, handles, labels)

        bands = "bands are ±1 standard deviation over seeds" if several else "a single seed each, so there are no bands"
        caption = (
            f"Look at whether lines still rise at the end and whether any stays flat, as a dead network does: {bands}."
        )
        title = f"{study.metric} during training at {study.label(point)}"
        figures.append(draw(f"training_{number + 1}", title, caption, 2.8 + legend_height(labels), paint))
    return figures


def _over_seeds(runs: Sequence[Run], metric: str) -> list[tuple[float, list[float]]]:
    """Return at most 120 epochs, each with the values of the seeds that logged a finite one."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for place, record in enumerate(run.curve):
            value = record.get(metric)
            if isinstance(value, int | float) and isfinite(value):
                found.setdefault(record.get("epoch", place), []).append(value)
    line = sorted(found.items())
    step = max(1, -(-len(line) // _EPOCHS))
    return line[::-1][::step][::-1]


def run_figures(run: Run) -> list[Picture]:
    """Draw a single run: the density of its layers, and its metrics over the epochs.

    Args:
        run: The run.

    Returns:
        At most nine figures.
    """
    figures = [_densities(run)] if run.layers else []
    names = list(
        dict.fromkeys(name for record in run.curve for name in record if name not in ("epoch", "step", "seconds"))
    )
    kinds: dict[str, list[str]] = {}
    for name in names:
        if _over_seeds([run], name):
            kinds.setdefault(name.rpartition("/")[2], []).append(name)
    return [*figures, *(_metric(run, kind, found[:8], i) for i, (kind, found) in enumerate(list(kinds.items())[:8]))]


def _metric(run: Run, kind: str, names: Sequence[str], number: int) -> Picture:
    labels = apart(names, 28)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles = []
        for place, name in enumerate(names):
            line = _over_seeds([run], name)
            style = {**look(place), "markevery": max(1, len(line) // _MARKS)}
            handles += axes.plot([epoch for epoch, _ in line], [v[0] for _, v in line], **style)
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True)
        axes.set_ylabel(abbreviate(kind, 44))
        axes.grid(alpha=0.2)
        legend(figure, axes, handles, labels)

    caption = "Look at the end of the lines: the run is one seed, so small differences between its epochs mean little."
    return draw(f"training_{number + 1}", f"{kind} during training", caption, 2.6 + legend_height(labels), paint)


def _densities(run: Run) -> Picture:
    shares = [100 * layer["kept"] / max(layer["total"], 1) for layer in run.layers]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(range(len(shares)), shares, color=look(0)["color"], height=0.75)
        for place, share in enumerate(shares):
            text = f"{share:.3g}" if share else "nothing"
            axes.text(min(share, 100) + 1, place, text, va="center", size=7.5, color=INK if share else "#D55E00")
        axes.set_yticks(range(len(shares)), apart([layer["name"] for layer in run.layers], 28))
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.set_xlim(0, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("density (% of the layer's entries kept)")
        axes.grid(axis="x", alpha=0.2)

    caption = "Look for short bars, layers of which little is kept, and for the word nothing, where none is."
    return draw("density", "Density of each layer", caption, 0.9 + 0.2 * max(len(shares), 2), paint)
