"""Values as short texts, and what a value is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from statistics import mean, stdev
from typing import Any


def abbreviate(text: str, width: int) -> str:
    """Shorten a text in its middle.

    Args:
        text: Any text.
        width: Characters to leave.

    Returns:
        The text itself if it is short enough.

    >>> abbreviate("network.features.12.weight", 15)
    'network….weight'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def apart(names: Sequence[str], width: int) -> list[str]:
    """Shorten dotted names so that they stay different: what all of them share goes first.

    Args:
        names: The names.
        width: Characters to leave.

    Returns:
        A name for each; numbered where nothing else tells them apart.

    >>> apart(["encoder.layers.0.projection.weight", "encoder.layers.1.projection.weight"], 20)
    ['…0.projection.weight', '…1.projection.weight']
    """
    parts = [name.split(".") for name in names]
    head = _shared(parts)
    tail = _shared([part[head:][::-1] for part in parts])
    mark = "…" if head else ""
    bare = [mark + ".".join(part[head:]) for part in parts]
    core = [mark + ".".join(part[head : len(part) - tail]) + ("…" if tail else "") for part in parts]
    for found in (list(names), bare):
        if max(map(len, found), default=0) <= width:
            return found
    for found in (bare, core):
        short = [abbreviate(name, width) for name in found]
        if len(set(short)) == len(set(names)):
            return short
    return [f"{place}: {abbreviate(name, width - 4)}" for place, name in enumerate(names, 1)]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """Count the leading components that all share; each keeps one at least."""
    least = min(map(len, parts), default=1) - 1
    return next((i for i in range(least) if len({part[i] for part in parts}) > 1), max(least, 0))


def show(value: Any) -> str:
    """Return a setting as text.

    Args:
        value: A number, a text or a structure.

    Returns:
        Numbers and texts as they are, the rest as JSON.
    """
    return value if isinstance(value, str) else json.dumps(value)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds.

    Args:
        values: One for each seed.

    Returns:
        Zero for a single one; NaN where a value is not finite.
    """
    if not all(map(isfinite, values)):
        return float("nan")
    return stdev(values) if len(values) > 1 else 0.0


def text_of(values: Sequence[float]) -> str:
    """Return mean and standard deviation.

    Args:
        values: One for each seed.

    Returns:
        "0.9861 ± 0.0039"; only the mean for a single seed.
    """
    return f"{mean(values):.4f} ± {spread(values):.4f}" if len(values) > 1 else f"{mean(values):.4f}"


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    Args:
        names: The names.

    Returns:
        "a, b and c".
    """
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""


def is_number(value: Any) -> bool:
    """Say whether a value is a number; true and false are not.

    Args:
        value: Anything.

    Returns:
        Whether it is.
    """
    return isinstance(value, int | float) and not isinstance(value, bool)
