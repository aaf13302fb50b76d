"""Axes that a plot of pruned networks needs."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isfinite, log10
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_PER_CENT = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def sparsity_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make an x axis of sparsities even in the logarithm of what is kept, with ticks at the values.

    Args:
        axes: Whose.
        values: What it must show, in [0, 1), ascending.
    """
    axes.set_xscale("function", functions=(_minus_log, _unlog))
    pad = ((values[-1] > values[0]) and 0.04 * (_kept(values[-1]) - _kept(values[0]))) or 0.05
    axes.set_xlim(1 - 10 ** -(_kept(values[0]) - pad), 1 - 10 ** -(_kept(values[-1]) + pad))
    ticks = list(values) if len(values) <= 8 else [t for t in _PER_CENT if values[0] <= t <= values[-1]]
    width = max(_kept(values[-1]) - _kept(values[0]), 1e-9)
    far: list[float] = []
    for tick in ticks:  # labels need a tenth of the width each
        if not far or (_kept(tick) - _kept(far[-1])) / width > 0.09:
            far.append(tick)
    axes.set_xticks(far, [f"{100 * t:.4g}" for t in far])
    axes.minorticks_off()


def value_axis(axes: Axes, values: Sequence[float]) -> None:
    """Put ticks at the values of a setting, on a log scale where they span more than a decade.

    Args:
        axes: Whose x axis.
        values: Ascending.
    """
    if values[0] > 0 and values[-1] / values[0] > 10:
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(values) <= 8:
        axes.set_xticks(values, [f"{value:.4g}" for value in values])


def _kept(sparsity: float) -> float:
    return -log10(1 - sparsity)


def _minus_log(sparsity: Any) -> Any:
    import numpy as np

    return -np.log10(np.maximum(1 - np.asarray(sparsity, dtype=float), 1e-9))


def _unlog(place: Any) -> Any:
    return 1 - 10.0**-place


def count_axis(axes: Axes, values: Sequence[float]) -> None:
    """Label a logarithmic x axis of counts with a few round numbers.

    Args:
        axes: Whose.
        values: What it must show.
    """
    low, high = 0.85 * min(values), 1.18 * max(values)
    fine = (1, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5) if high / low < 100 else (1,)
    powers = range(int(log10(low)) - 1, int(log10(high)) + 2)
    ticks = [t for power in powers for f in fine if low <= (t := f * 10**power) <= high]
    if len(ticks) < 2:
        ticks = sorted({min(values), max(values)})
    axes.set_xticks(ticks, [count(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)


def powers_of_ten(axis: Axis, low: float, high: float, flat: float | None = None) -> None:
    """Make one axis logarithmic, with few ticks.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        low: Lowest value it must show.
        high: Highest value it must show.
        flat: Width of the part around zero that is linear, for values of both signs; None for positive values.
    """
    scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    if flat is not None:
        scale("symlog", linthresh=flat)
        power = floor(log10(max(-low, high)))
        ticks = {-(10.0**power): f"-1e{power}", 0.0: "0", 10.0**power: f"1e{power}"}
        ticks = {tick: text for tick, text in ticks.items() if low <= tick <= high}
    else:
        scale("log")
        first, last = floor(log10(low)), floor(log10(high)) + 1
        step = max(1, -(-(last - first) // 4))
        ticks = {10.0**power: f"1e{power}" for power in range(last, first - 1, -step)}
        ticks = {tick: text for tick, text in ticks.items() if 0.5 * low <= tick <= 2 * high}
    axis.set_ticks(list(ticks), list(ticks.values()))
    axis.set_ticks([], minor=True)


def count(value: float) -> str:
    """Return a count in few letters.

    Args:
        value: The count.

    Returns:
        "20 k", "1.5 M".

    >>> count(1500), count(20), count(3e9)
    ('1.5 k', '20', '3 G')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if isfinite(value) and value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"
