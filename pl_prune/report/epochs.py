"""Lines over the epochs of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import mean
from typing import TYPE_CHECKING, Any, TypeAlias

from pl_prune.report.canvas import band
from pl_prune.report.grid import Run
from pl_prune.report.words import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line: TypeAlias = list[tuple[float, list[float]]]
"""Epochs, each with the values of the seeds."""

_EPOCHS = 120
_MARKS = 8


def over_seeds(runs: Sequence[Run], metric: str) -> Line:
    """Read a metric of runs that differ by their seed.

    Args:
        runs: The runs.
        metric: Its name in metrics.jsonl.

    Returns:
        At most 120 epochs, each with the values of the seeds that logged a finite one.
    """
    found: dict[float, list[float]] = {}
    for run in runs:
        for place, record in enumerate(run.curve):
            value = record.get(metric)
            if isinstance(value, int | float) and isfinite(value):
                found.setdefault(record.get("epoch", place), []).append(value)
    line = sorted(found.items())
    step = max(1, -(-len(line) // _EPOCHS))
    return line[::-1][::step][::-1]


def trace(axes: Axes, line: Line, style: Mapping[str, Any]) -> Any:
    """Draw the mean over seeds, and shade one standard deviation.

    Args:
        axes: Where.
        line: What.
        style: Keywords of `Axes.plot`.

    Returns:
        The line's handle.
    """
    xs, middle = [epoch for epoch, _ in line], [mean(values) for _, values in line]
    if any(len(values) > 1 for _, values in line):
        band(axes, xs, middle, [spread(values) for _, values in line], style["color"])
    return axes.plot(xs, middle, **style, markevery=max(1, len(line) // _MARKS))[0]


def epoch_axis(axes: Axes) -> None:
    """Label the x axis.

    Args:
        axes: Whose.
    """
    axes.set_xlabel("epoch")
    axes.locator_params("x", integer=True)
    low, high = axes.get_xlim()
    if high - low < 1:  # of a single epoch
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.grid(alpha=0.2)
