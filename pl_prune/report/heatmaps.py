"""Figures of what the masks left: density by layer, collapse, and how far the rows' masks agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import isnan, nan
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from pl_prune.core.types import PruneError
from pl_prune.report.canvas import INK, PAPER, WIDTH, Picture, draw
from pl_prune.report.grid import Group, Run, Study
from pl_prune.report.sparsity import BOTTLENECK
from pl_prune.report.words import abbreviate, apart, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 6


def density_figures(study: Study) -> list[Picture]:
    """Draw the density of every layer under every row, at the sparsest and at the densest point.

    Args:
        study: The study.

    Returns:
        At most two figures; none where no run has a report.
    """
    figures = []
    for number, point in enumerate(study.shown):
        groups = [g for g in study.at(point) if any(run.layers for run in g.runs)]
        layers = list(dict.fromkeys(layer["name"] for g in groups for run in g.runs for layer in run.layers))
        if not layers:
            continue
        table = [[_density(g, name) for g in groups] for name in layers]
        title = f"Density of each layer at {study.label(point)}"
        caption = (
            "Look for dark cells, where little is kept (% of the layer's entries, mean over seeds; log scale), "
            "and for crosses, where nothing is."
        )

        def paint(figure: Figure, table: Any = table, groups: Any = groups, layers: Any = layers) -> None:
            from matplotlib.colors import LogNorm

            axes = figure.add_subplot()
            low = min((v for line in table for v in line if v > 0), default=0.01)
            low = min(max(low, 1e-4), 0.5)
            norm = LogNorm(low, 1)
            mesh = _cells(axes, table, norm, "cividis")
            _names(axes, [g.cell.row for g in groups], layers)
            for y, line in enumerate(table):
                for x, value in enumerate(line):
                    if value == 0:
                        axes.plot(x, y, "x", color="#D55E00", markersize=6, markeredgewidth=2)
                    elif len(groups) <= 8 and not isnan(value):
                        dark = norm(value) < 0.55
                        text = f"{100 * value:.2g}" if value < 0.995 else "100"
                        axes.text(x, y, text, color="white" if dark else "black", ha="center", va="center", size=7)
            ticks = [low, *(t for t in (1e-3, 0.01, 0.03, 0.1, 0.3, 1) if t > 1.5 * low)]
            bar = figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.02, ticks=ticks)
            bar.ax.set_yticklabels([f"{100 * tick:.2g}" if tick < 1 else "100" for tick in ticks])
            bar.ax.minorticks_off()
            bar.set_label("density (%)")

        figures.append(draw(f"density_{number + 1}", title, caption, _tall(len(layers), groups), paint))
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
            top = max((v for line in table for v in line if not isnan(v)), default=0)
            _cells(axes, table, _linear(top or 1), "Blues")
            for (row, i), value in found.items():
                text = "-" if isnan(value) else f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
                color = INK if isnan(value) else "white" if value > 0.6 * (top or 1) else "black"
                axes.text(i, rows.index(row), text, color=color, ha="center", va="center", size=7.5)
            axes.set_title(title)
            _names(axes, [_tick(study, p) for p in points], rows, room=14)
        every[1].set_xlabel(abbreviate(study.short(study.axis), 40) if study.axis else "point of the grid")

    caption = (
        "Look for numbers above zero: a collapsed layer has nothing left, a bottleneck lost at least "
        f"{BOTTLENECK:.0%}, an empty output channel computes a constant (means over seeds)."
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
    groups = [g for g in study.at(point) if any(_file(run).is_file() for run in g.runs)]
    if len(groups) < 2:
        return None
    masks = [[_bits(_file(run)) for run in g.runs if _file(run).is_file()][:2] for g in groups]
    table = [[nan] * len(groups) for _ in groups]
    for i, j in combinations(range(len(groups)), 2):
        table[i][j] = table[j][i] = _overlap(masks[i][0], masks[j][0])
    for i, mine in enumerate(masks):
        table[i][i] = _overlap(*mine) if len(mine) > 1 else nan

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = [g.cell.row for g in groups]
        mesh = _cells(axes, table, _linear(1), "cividis")
        _names(axes, rows, rows)
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if not isnan(value) and len(groups) <= 10:
                    color = "white" if value < 0.55 else "black"
                    axes.text(x, y, f"{value:.2f}", color=color, ha="center", va="center", size=7)
        figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.02).set_label("IoU (0 to 1)")

    kept = mean(1 - (g.average(lambda run: run.record.get("sparsity")) or 0) for g in groups)
    caption = (
        "Look for bright pairs, whose masks keep the same weights (intersection over union; first seed of each row; "
        f"the diagonal compares two seeds of one row): masks drawn at random would have about {kept / (2 - kept):.2f}."
    )
    return draw("agreement", f"Agreement of masks at {study.label(point)}", caption, _tall(len(groups), groups), paint)


def _density(group: Group, name: str) -> float:
    def of(run: Run) -> float | None:
        return next((float(x["kept"] / max(x["total"], 1)) for x in run.layers if x["name"] == name), None)

    value = group.average(of)
    return nan if value is None else value


def _empty(layers: Sequence[dict[str, Any]]) -> float:
    channels = sum(x["shape"][0] for x in layers if x["shape"])
    return float(100 * sum(x["empty_rows"] for x in layers) / max(channels, 1))


def _cells(axes: Axes, table: list[list[float]], norm: Any, colors: str) -> Any:
    xs, ys = ([place - 0.5 for place in range(size + 1)] for size in (len(table[0]), len(table)))
    mesh = axes.pcolormesh(xs, ys, table, norm=norm, cmap=colors, edgecolors=PAPER, linewidth=0.8)
    axes.set_xlim(-0.5, len(table[0]) - 0.5)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def _linear(top: float) -> Any:
    from matplotlib.colors import Normalize

    return Normalize(0, top)


def _names(axes: Axes, across: Sequence[str], down: Sequence[str], room: int = 44) -> None:
    short = apart(across, 14)
    turned = max(map(len, short), default=0) * len(short) > room
    axes.set_xticks(range(len(short)), short, rotation=90 if turned else 0)
    axes.set_yticks(range(len(down)), apart(down, 24))


def _tall(lines: int, groups: Sequence[Group]) -> float:
    return min(1.1 + 0.2 * max(lines, 4) + 0.06 * max(min(len(g.cell.row), 14) for g in groups), 4 * WIDTH)


def _tick(study: Study, point: dict[str, Any]) -> str:
    return show(point[study.axis]) if study.axis and len(point) == 1 else ", ".join(map(show, point.values())) or "all"


def _file(run: Run) -> Path:
    return run.folder / "masks.safetensors"


def _bits(file: Path) -> dict[str, Any]:
    """Read packed masks: an array of bytes a parameter, of which every bit is an entry."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as stored:
            found = {name: stored.get_tensor(name) for name in sorted(stored.keys())}
        if any(bits.dtype != "uint8" for bits in found.values()):
            raise ValueError("not bits")
        return found
    except (SafetensorError, ValueError) as error:
        raise PruneError(
            f"Expected masks in {str(file)!r}; found a damaged file ({error}). Run the fit again."
        ) from error


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the intersection over the union of what two masks keep; NaN for two architectures."""
    import numpy as np

    if {n: b.shape for n, b in one.items()} != {n: b.shape for n, b in other.items()}:
        return nan
    ones = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
    both = sum(int(ones[one[n] & other[n]].sum(dtype=np.int64)) for n in one)
    either = sum(int(ones[one[n] | other[n]].sum(dtype=np.int64)) for n in one)
    return both / either if either else 1.0
