"""Figures of a study's numbers: the metric along the grid, and against what is left to pay."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from pl_prune.report.axes import count_axis, sparsity_axis, value_axis
from pl_prune.report.canvas import INK, Picture, band, draw, legend, legend_height, look
from pl_prune.report.costs import latency, latency_words
from pl_prune.report.findings import failed
from pl_prune.report.grid import Group, Run, Study
from pl_prune.report.words import abbreviate, apart, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = 4


def metric_figures(study: Study) -> list[Picture]:
    """Draw the metric against the first numeric key of the grid: a figure for each setting of the others.

    Args:
        study: The study.

    Returns:
        At most five figures; bars where no key is numeric.
    """
    if study.axis is None:
        return [_bars(study, study.points[:_PANELS])] if study.points else []
    rest = {json.dumps(other): other for point in study.points if point for other in [_without(point, study.axis)]}
    figures = []
    for number, other in enumerate(list(rest.values())[:_PANELS]):
        where = f" at {study.label(other)}" if other else ""
        more = (
            f" {len(rest) - _PANELS} more settings of the other keys are in the table." if len(rest) > _PANELS else ""
        )
        figures.append(_lines(study, other, f"metric_{number + 1}", where, more, zoom=False))
        if number == 0 and _floor(study) is not None:
            figures.append(_lines(study, other, "metric_near_the_top", where, "", zoom=True))
    return figures


def _without(point: dict[str, Any], axis: str) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != axis}


def _floor(study: Study) -> tuple[float, float] | None:
    """Return y limits that leave out what failed; None where nothing did."""
    low = [g for g in study.groups if g.finite and failed(study, g)]
    rest = [g for g in study.groups if g.finite and not failed(study, g)]
    if not low or not rest:
        return None
    ends = [end for g in rest for end in g.cell.interval()]
    margin = 0.08 * (max(ends) - min(ends)) or 0.01
    return min(ends) - margin, max(ends) + margin


def _lines(study: Study, other: dict[str, Any], name: str, where: str, more: str, *, zoom: bool) -> Picture:
    axis = study.axis or ""
    short = study.short(axis)
    chosen = [g for g in study.groups if axis in g.cell.settings and _without(g.cell.settings, axis) == other]
    outside = [g for g in study.groups if not g.cell.settings and g.finite]
    values = sorted({g.cell.settings[axis] for g in chosen})
    as_density = axis.endswith("sparsity") and all(0 <= v < 1 for v in values)
    rows = list(dict.fromkeys([g.cell.row for g in chosen] + [g.cell.row for g in outside]))
    labels = apart(rows, 28)
    several = any(len(g.runs) > 1 for g in chosen)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles: dict[str, Any] = {}
        for group in outside:
            color = INK if group is study.dense else look(study.rows.index(group.cell.row))["color"]
            low, high = group.cell.interval()
            axes.axhspan(low, high, color=color, alpha=0.15, linewidth=0)
            handles[group.cell.row] = axes.axhline(mean(group.cell.last), color=color, linewidth=1, dashes=(6, 2))
        for row in rows:
            line = [g for g in chosen if g.cell.row == row]
            if line:
                line.sort(key=lambda g: g.cell.settings[axis])
                xs = [g.cell.settings[axis] for g in line]
                ys = [mean(g.cell.last) for g in line]
                style = look(study.rows.index(row))
                band(axes, xs, ys, [spread(g.cell.last) for g in line], style["color"])
                handles[row] = axes.plot(xs, ys, **style)[0]
        if as_density:
            sparsity_axis(axes, values)
        else:
            value_axis(axes, values)
        if zoom and (limits := _floor(study)):
            axes.set_ylim(limits)
        axes.set_xlabel(f"{abbreviate(short, 40)}{' (% pruned; log scale of what is kept)' if as_density else ''}")
        axes.set_ylabel(abbreviate(f"{study.metric}, last epoch", 44))
        axes.grid(alpha=0.2)
        legend(figure, axes, [handles[row] for row in rows], labels)

    better = "higher" if study.direction == "maximize" else "lower"
    bands = "bands are ±1 standard deviation over seeds" if several else "a single seed each, so there are no bands"
    title = f"{study.metric} against {short}{where}{', without what failed' if zoom else ''}"
    caption = f"Look for lines ({better} is better) whose bands keep apart: {bands}; rows outside the grid are horizontal.{more}"
    return draw(name, title, caption, 2.9 + legend_height(labels), paint)


def _bars(study: Study, points: Sequence[dict[str, Any]]) -> Picture:
    found = [(p, [g for g in study.at(p) if g.finite]) for p in points]
    names = [abbreviate(study.label(p), 30) for p in points]
    rows = [row for row in study.rows if any(g.cell.row == row for _, groups in found for g in groups)]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        places: list[float] = []
        labels: list[str] = []
        at = 0.0
        for (_, groups), name in zip(found, names, strict=True):
            for group in groups:
                color = look(study.rows.index(group.cell.row))["color"]
                value, width = mean(group.cell.last), spread(group.cell.last)
                axes.barh(at, value, xerr=width or None, color=color, ecolor=INK, capsize=2, height=0.72)
                places.append(at)
                labels.append(abbreviate(group.cell.row, 24) + (f" | {name}" if len(points) > 1 else ""))
                at += 1
            at += 0.6
        if study.dense is not None and study.dense.finite:
            axes.axvspan(*study.dense.cell.interval(), color=INK, alpha=0.2, linewidth=0)
            axes.axvline(mean(study.dense.cell.last), color=INK, linewidth=1, dashes=(6, 2))
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_xlabel(abbreviate(f"{study.metric}, last epoch", 60))
        axes.grid(axis="x", alpha=0.2)

    better = "longer" if study.direction == "maximize" else "shorter"
    dense = "; the broken line is the dense row" if study.dense else ""
    caption = f"Look for bars ({better} is better) whose whiskers, ±1 standard deviation over seeds, keep apart{dense}."
    return draw("metric_1", f"{study.metric} of each row", caption, 1.0 + 0.24 * len(rows) * len(points), paint)


def pareto_figures(study: Study) -> list[Picture]:
    """Draw the metric against the parameters and MACs that are kept and the measured latency, with the front marked.

    Args:
        study: The study.

    Returns:
        At most three figures; none where no run has a report.
    """
    wanted: list[tuple[str, Callable[[Run], float | None], str, str]] = [
        (
            "parameters",
            lambda run: run.cost.get("params_kept"),
            "parameters kept",
            "parameters kept in the whole model (count, log scale)",
        ),
        ("macs", lambda run: run.cost.get("macs_kept"), "MACs kept", "MACs kept for one sample (count, log scale)"),
        ("latency", latency, "latency", "measured latency of one forward pass, masked (ms, log scale)"),
    ]
    figures = [_pareto(study, name, cost, word, label) for name, cost, word, label in wanted]
    return [figure for figure in figures if figure]


def _pareto(study: Study, name: str, measure: Callable[[Run], float | None], word: str, label: str) -> Picture | None:
    spots: list[tuple[float, float, Group]] = []
    for group in study.groups:
        cost = group.average(measure)
        if cost and group.finite:
            spots.append((cost, mean(group.cell.last), group))
    if not spots:
        return None
    sign = 1 if study.direction == "maximize" else -1
    front: list[tuple[float, float, Group]] = []
    for spot in sorted(spots, key=lambda s: (s[0], -sign * s[1])):
        if not front or sign * spot[1] > sign * front[-1][1]:
            front.append(spot)
    rows = [row for row in study.rows if any(s[2].cell.row == row for s in spots)]
    labels = [*apart(rows, 28), "Pareto front"]
    limits = _floor(study)
    below = sum(not limits[0] <= s[1] <= limits[1] for s in spots) if limits else 0
    absent = sum(g.finite for g in study.groups) - len(spots)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        (line,) = axes.step(
            [s[0] for s in front], [s[1] for s in front], where="post", color=INK, linewidth=1, alpha=0.8
        )
        axes.scatter(
            [s[0] for s in front], [s[1] for s in front], s=70, facecolors="none", edgecolors=INK, linewidths=1
        )
        handles = []
        for row in rows:
            mine = [s for s in spots if s[2].cell.row == row]
            style = {**look(study.rows.index(row)), "linestyle": "none"}
            if mine[0][2] is study.dense:
                style |= {"color": INK, "marker": "*", "markersize": 8}
            handles += axes.plot([s[0] for s in mine], [s[1] for s in mine], **style)
        axes.set_xscale("log")
        count_axis(axes, [s[0] for s in spots])
        if limits:
            axes.set_ylim(limits)
        axes.set_xlabel(label)
        axes.set_ylabel(abbreviate(f"{study.metric}, last epoch", 44))
        axes.grid(alpha=0.2)
        legend(figure, axes, [*handles, line], labels)

    better = "higher" if sign > 0 else "lower"
    notes = f" {below} that failed lie outside the frame." * bool(
        below
    ) + f" {absent} without one are left out." * bool(absent)
    less = "is faster" if name == "latency" else f"has fewer {word}"
    caption = f"Look at the ringed points: no other point {less} and is {better}.{notes}"
    if name == "latency":
        caption += f" {latency_words([run for s in spots for run in s[2].runs])}"
    return draw(f"pareto_{name}", f"{study.metric} against {word}", caption, 2.8 + legend_height(labels), paint)
