"""Figures of training, and of a single run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pl_prune.report.canvas import INK, Picture, draw, legend, legend_height, look
from pl_prune.report.epochs import epoch_axis, over_seeds, trace
from pl_prune.report.grid import Run, Study
from pl_prune.report.sharpness import is_sharpness, run_sharpness, sharpness_figures
from pl_prune.report.words import abbreviate, apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = 100
"""Bars in one figure."""


def curve_figures(study: Study) -> list[Picture]:
    """Draw the metric over the epochs for every row, at the sparsest and at the densest point; and sharpness, where it was measured.

    Args:
        study: The study.

    Returns:
        At most four figures; none where no run logged the metric.
    """
    figures = []
    for number, point in enumerate(study.shown):
        lines = {g.cell.row: over_seeds(g.runs, study.metric) for g in study.at(point)}
        lines = {row: line for row, line in lines.items() if line}
        if not lines:
            continue
        if study.dense is not None and (line := over_seeds(study.dense.runs, study.metric)):
            lines[study.dense.cell.row] = line
        labels = apart(list(lines), 28)
        several = any(len(values) > 1 for line in lines.values() for _, values in line)

        def paint(figure: Figure, lines: Any = lines, labels: Any = labels) -> None:
            axes = figure.add_subplot()
            handles = []
            for row, line in lines.items():
                dense = study.dense is not None and row == study.dense.cell.row
                own = {"color": INK, "linestyle": (0, (6, 2)), "marker": ""} if dense else look(study.rows.index(row))
                handles.append(trace(axes, line, own))
            epoch_axis(axes)
            axes.set_ylabel(abbreviate(study.metric, 44))
            legend(figure, axes, handles, labels)

        bands = "bands are ±1 standard deviation over seeds" if several else "a single seed each, so there are no bands"
        caption = (
            f"Look at whether lines still rise at the end and whether any stays flat, as a dead network does: {bands}."
        )
        title = f"{study.metric} during training at {study.label(point)}"
        figures.append(draw(f"training_{number + 1}", title, caption, 2.8 + legend_height(labels), paint))
    return [*figures, *sharpness_figures(study)]


def run_figures(run: Run) -> list[Picture]:
    """Draw a single run: the density of its layers, and its metrics over the epochs; sharpness has a figure of its own.

    Args:
        run: The run.

    Returns:
        At most ten figures.
    """
    layers = {layer["name"]: (layer["kept"], layer["total"]) for layer in run.layers}
    figures = [density_figure(layers, "units" if run.sliced else "entries")] if layers else []
    names = list(
        dict.fromkeys(name for record in run.curve for name in record if name not in ("epoch", "step", "seconds"))
    )
    kinds: dict[str, list[str]] = {}
    for name in names:
        if over_seeds([run], name) and not is_sharpness(name):
            kinds.setdefault(name.rpartition("/")[2], []).append(name)
    figures += [_metric(run, kind, found[:8], i) for i, (kind, found) in enumerate(list(kinds.items())[:8])]
    return [*figures, *run_sharpness(run)]


def _metric(run: Run, kind: str, names: Sequence[str], number: int) -> Picture:
    labels = apart(names, 28)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles = []
        for place, name in enumerate(names):
            handles.append(trace(axes, over_seeds([run], name), look(place)))
        epoch_axis(axes)
        axes.set_ylabel(abbreviate(kind, 44))
        legend(figure, axes, handles, labels)

    caption = "Look at the end of the lines: the run is one seed, so small differences between its epochs mean little."
    return draw(f"training_{number + 1}", f"{kind} during training", caption, 2.6 + legend_height(labels), paint)


def density_figure(layers: Mapping[str, tuple[int, int]], of: str) -> Picture:
    """Draw what is left of each layer; of very many, the sparsest.

    Args:
        layers: What is kept and what there is in all, by layer.
        of: What is counted: entries or units.

    Returns:
        The figure.
    """
    every = {name: 100 * kept / max(total, 1) for name, (kept, total) in layers.items()}
    least = set(sorted(every, key=every.__getitem__)[:_LAYERS])
    shown = {name: share for name, share in every.items() if name in least}
    shares = list(shown.values())

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(range(len(shares)), shares, color=look(0)["color"], height=0.75)
        for place, share in enumerate(shares):
            text = f"{share:.3g}" if share else "nothing"
            axes.text(min(share, 100) + 1, place, text, va="center", size=7.5, color=INK if share else "#D55E00")
        axes.set_yticks(range(len(shares)), apart(list(shown), 28))
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.set_xlim(0, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel(f"density (% of the layer's {of} kept)")
        axes.grid(axis="x", alpha=0.2)

    caption = "Look for short bars, layers of which little is kept, and for the word nothing, where none is."
    caption += f" The {_LAYERS} sparsest of {len(layers)} layers." if len(layers) > _LAYERS else ""
    return draw("density", "Density of each layer", caption, 0.9 + 0.2 * max(len(shares), 2), paint)
