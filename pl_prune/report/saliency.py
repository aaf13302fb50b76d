"""Figures of scores: how they lie, and how far those of two criteria agree."""

from __future__ import annotations

from collections.abc import Sequence
from math import asinh, isnan, log10
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pl_prune.report.axes import powers_of_ten
from pl_prune.report.canvas import INK, Picture, draw, look, panels
from pl_prune.report.cells import cells, linear, tall, ticks, write
from pl_prune.report.entries import Entries, rank_correlations
from pl_prune.report.words import apart, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 60
REST = "#9aa3ad"
"""What is pruned: a grey that is seen on light and on dark paper."""


def saliency_figure(found: Sequence[Entries]) -> Picture | None:
    """Draw the histogram of every run's scores, what is kept in colour, and the threshold.

    Args:
        found: The runs, in the order of the study's rows.

    Returns:
        The figure; None where there are no runs.
    """
    if not found:
        return None

    def paint(figure: Figure) -> None:
        titles = apart([one.row for one in found], 20)
        zeros = [float((one.scores == 0).double().mean()) for one in found]
        titles = [f"{title} ({100 * z:.2g} % are 0)" if z else title for title, z in zip(titles, zeros, strict=True)]
        every = panels(figure, titles, alike="y")
        top = max(_histogram(axes, one, str(look(one.place)["color"])) for axes, one in zip(every, found, strict=True))
        for axes in every:
            powers_of_ten(axes.yaxis, 1, top)
            axes.set_ylim(0.7, 2 * top)
        figure.supxlabel("score (log scale; both signs where there are negative ones)", size=9)
        figure.supylabel("entries (log scale)", size=9)

    title = "Scores of the entries" if len(found) > 1 else f"Scores of the entries of {found[0].row}"
    return draw("saliency", title, _said(found), 0.55 + 1.35 * -(-len(found) // 2), paint)


def edges(values: Tensor) -> tuple[list[float], float | None]:
    """Divide values into bins even in the logarithm.

    Args:
        values: Finite ones.

    Returns:
        Ends of the bins, and the width of the part around zero that is not logarithmic: None where no value is negative.
    """
    sizes = values[values != 0].abs()
    if not len(sizes):
        return [-1.0, 1.0], None
    low, high = float(sizes.quantile(0.001)), float(sizes.max())
    if float(values.min()) < 0:
        flat = float(sizes.median()) / 10
        first, last = asinh(float(values.min()) / flat), asinh(max(float(values.max()), 0.0) / flat)
        return (torch.linspace(first, last, _BINS + 1, dtype=torch.float64).sinh() * flat).tolist(), flat
    if low * 1.01 >= high:
        low, high = high / 2, high * 2
    return torch.logspace(log10(low), log10(high), _BINS + 1, dtype=torch.float64).tolist(), None


def counts(values: Tensor, ends: Sequence[float]) -> list[float]:
    """Count values in bins; those outside go into the nearest.

    Args:
        values: The values.
        ends: Ends of the bins, ascending.

    Returns:
        A count for each bin.
    """
    places = torch.bucketize(values.contiguous(), torch.tensor(ends[1:-1], dtype=values.dtype), right=True)
    return places.bincount(minlength=len(ends) - 1).double().tolist()


def bars(axes: Axes, heights: Sequence[float], ends: Sequence[float], color: str) -> Any:
    """Draw the bars of a histogram; limits are the caller's, for matplotlib's own go through every corner in Python.

    Args:
        axes: Where.
        heights: Of the bars.
        ends: Ends of the bins, ascending.
        color: Of the bars.

    Returns:
        Their patch.
    """
    from matplotlib.patches import StepPatch

    return axes.add_artist(StepPatch(heights, ends, fill=True, color=color))


def _histogram(axes: Axes, one: Entries, color: str) -> float:
    """Return the count of the highest bar."""
    ends, flat = edges(one.scores)
    zero = one.scores == 0
    shown = ~zero if flat is None and not bool(zero.all()) else torch.ones_like(zero)
    every = counts(one.scores[shown], ends)
    bars(axes, every, ends, REST)
    bars(axes, counts(one.scores[shown & one.kept], ends), ends, color)
    room = (ends[-1] / ends[0]) ** 0.04 if ends[0] > 0 else 1
    axes.set_xlim(ends[0] / room, ends[-1] * room)
    if flat is not None or ends[0] > 0:
        powers_of_ten(axes.xaxis, ends[0], ends[-1], flat)
    if one.threshold is not None:
        axes.axvline(one.threshold, color=INK, linewidth=1, dashes=(4, 2))
    return max(every)


def _said(found: Sequence[Entries]) -> str:
    wide = {one.row: decades(one.scores) for one in found}
    first, last = max(wide, key=lambda row: wide[row]), min(wide, key=lambda row: wide[row])
    words = f"Scores of {first} span {wide[first]:.1f} decades between their 5th and 95th percentile"
    words += f", those of {last} {wide[last]:.1f}" if len(found) > 1 else ""
    lost = [one.row for one in found if one.threshold is None]
    line = "the broken line is the lowest kept score, above which everything is kept (in colour)"
    if len(lost) == len(found):
        line = "what is kept is in colour; no single threshold divides it from the rest, as layers have their own"
    elif lost:
        line += f", but for {listed(lost)}, where no single threshold divides kept from pruned"
    sampled = max(found, key=lambda one: one.total)
    part = ""
    if len(sampled.scores) < sampled.total:
        part = f" Of the {sampled.total:,} entries, {len(sampled.scores):,} drawn at random are counted."
    return f"{words}; {line}. The first bar holds all smaller scores.{part}"


def decades(values: Tensor) -> float:
    """Say how far the sizes of values spread.

    Args:
        values: The values.

    Returns:
        Decimal logarithm of the 95th over the 5th percentile of what is not zero, in absolute value.
    """
    sizes = values[values != 0].abs()
    if not len(sizes):
        return 0.0
    low, high = sizes.quantile(torch.tensor([0.05, 0.95], dtype=sizes.dtype)).tolist()
    return log10(high / low)


def short(value: float) -> str:
    """Return a correlation in two digits.

    Args:
        value: In [-1, 1].

    Returns:
        "0.81"; zero has no sign.
    """
    return f"{round(value, 2) + 0.0:.2f}"


def correlation_figure(found: Sequence[Entries]) -> Picture | None:
    """Draw the rank correlation between the scores of every two runs.

    Args:
        found: The runs.

    Returns:
        The figure; None for fewer than two runs.
    """
    if len(found) < 2:
        return None
    table = rank_correlations(found)
    rows = [one.row for one in found]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        mesh = cells(axes, table, linear(1, -1), "RdBu_r")
        ticks(axes, rows, rows)
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if len(rows) <= 12:
                    text, color = (
                        ("-", INK) if isnan(value) else (short(value), "white" if abs(value) > 0.6 else "black")
                    )
                    write(axes, x, y, text, color)
        figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.02).set_label("rank correlation (-1 to 1)")

    pairs = [(table[i][j], rows[i], rows[j]) for i in range(len(rows)) for j in range(i) if not isnan(table[i][j])]
    if pairs:
        (high, a, b), (low, c, d) = max(pairs), min(pairs)
        said = f"{b} and {a} order the entries most alike ({short(high)})"
        said += f", {d} and {c} least ({short(low)})" if len(pairs) > 1 else ""
    else:
        said = "No two rows can be compared: their scores are constant, or of different networks"
    caption = (
        f"{said}: Spearman's rank correlation of the scores of all entries, pruned ones included; 0 is no relation."
    )
    return draw("correlation", "Correlation between the rows' scores", caption, tall(len(rows), rows), paint)
