"""What a run logged, and what it reached by the metric that decides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import isfinite, nan
from pathlib import Path
from typing import Any

from pl_prune.core.types import PruneError


class MetricMissing(PruneError):
    """No epoch of a run has logged the metric that decides."""


def read_records(file: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON record on each line.

    Args:
        file: Its path.

    Returns:
        The records; a last line that was cut off by a crash is left out.

    Raises:
        PruneError: If another line holds anything else.
    """
    found = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(keepends=True), 1):
        if line.endswith("\n") and line.strip():
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise PruneError(
                    f"Expected a JSON record on line {number} of {str(file)!r}; found something else ({error}). Delete the line."
                ) from error
    return found


def reached(records: Sequence[Mapping[str, float]], metric: str, direction: str, run: object) -> dict[str, Any]:
    """Read what a run reached by one metric.

    Args:
        records: What it logged, an epoch each.
        metric: The metric.
        direction: "maximize" or "minimize", which says what the best epoch is.
        run: Names the run in errors.

    Returns:
        The metric, the direction, and its value after the best and after the last epoch. The best is the best finite
        value; NaN where there is none.

    Raises:
        MetricMissing: If no epoch has the metric.
    """
    values = [record[metric] for record in records if metric in record]
    if not values:
        known = sorted({name for record in records for name in record} - {"epoch", "step", "seconds"})
        close = get_close_matches(metric, known, 1)
        raise MetricMissing(
            f"Expected the metric {metric!r} in {str(run)!r}; found {', '.join(known) or 'none'}. "
            + (f"The closest name is {close[0]!r}." if close else "Choose one that the module logs each epoch.")
        )
    finite = [value for value in values if isfinite(value)] or [nan]
    best = max(finite) if direction == "maximize" else min(finite)
    return {"metric": metric, "direction": direction, "best": best, "last": values[-1]}
