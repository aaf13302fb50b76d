"""Figures of a search: what every proposed point reached."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

from pl_prune.report.axes import powers_of_ten
from pl_prune.report.canvas import INK, Picture, draw, legend, legend_height, look
from pl_prune.report.findings import found_by_search
from pl_prune.report.grid import Study
from pl_prune.report.words import abbreviate, apart, is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEYS = 4


def search_figures(study: Study) -> list[Picture]:
    """Draw the metric against each searched number: a point for every run, the best of each row ringed.

    Args:
        study: The study.

    Returns:
        At most four figures.
    """
    points = [g for g in study.groups if g.cell.settings and g.finite]
    values = {key: [g.cell.settings[key] for g in points if key in g.cell.settings] for key in study.keys}
    keys = [key for key, found in values.items() if all(map(is_number, found)) and len(set(found)) > 1]
    return [_scatter(study, key, number) for number, key in enumerate(keys[:_KEYS], 1)]


def _scatter(study: Study, key: str, number: int) -> Picture:
    points = [g for g in study.groups if g.cell.settings and g.finite and key in g.cell.settings]
    rows = list(dict.fromkeys(g.cell.row for g in points))
    outside = [g for g in study.groups if not g.cell.settings and g.finite]
    labels = apart([*rows, *(g.cell.row for g in outside)], 28)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles = []
        for row in rows:
            own = [g for g in points if g.cell.row == row]
            style = {**look(study.rows.index(row)), "linestyle": "none"}
            xs, ys = [g.cell.settings[key] for g in own], [mean(g.cell.last) for g in own]
            handles += axes.plot(xs, ys, **style)
        for group in outside:
            handles.append(axes.axhline(mean(group.cell.last), color=INK, linewidth=1, dashes=(6, 2)))
        best = [g for g in found_by_search(study) if key in g.cell.settings]
        xs, ys = [g.cell.settings[key] for g in best], [mean(g.cell.last) for g in best]
        axes.plot(xs, ys, linestyle="none", marker="o", markersize=11, markerfacecolor="none", color=INK)
        values = sorted(g.cell.settings[key] for g in points)
        if values[0] > 0 and values[-1] / values[0] > 30:
            powers_of_ten(axes.xaxis, values[0], values[-1])
        axes.set_xlabel(abbreviate(study.short(key), 44))
        axes.set_ylabel(abbreviate(f"{study.metric}, last epoch", 44))
        axes.grid(alpha=0.2)
        legend(figure, axes, handles, labels)

    others = f"Other searched settings differ from point to point{_beside(study, key)}." if len(study.keys) > 1 else ""
    caption = f"Each point is a run; the best of each row is ringed. {others}".strip()
    title = f"{study.metric} against {study.short(key)}"
    return draw(f"search_{number}", title, caption, 2.9 + legend_height(labels), paint)


def _beside(study: Study, key: str) -> str:
    sparse = [other for other in study.keys if other.endswith("sparsity") and other != key]
    return ", the sparsity among them" if sparse else ""
