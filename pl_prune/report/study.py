"""The table of a study: mean and standard deviation over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from pl_prune.report.table import columns


@dataclass(frozen=True)
class Cell:
    """The runs of one row at one point of the grid.

    Args:
        row: Name of the row.
        settings: The point of the grid; empty for a row outside it.
        seeds: The seeds, in order.
        last: The metric after the last epoch, a value for each seed.
        best: The metric after the best epoch.
        seconds: Mean wall time of a run.
        pruning_seconds: Mean time spent on making masks.
        peak_bytes: Highest peak of memory; None where the system does not tell.
    """

    row: str
    settings: dict[str, Any]
    seeds: list[int]
    last: list[float]
    best: list[float]
    seconds: float
    pruning_seconds: float
    peak_bytes: int | None

    def interval(self) -> tuple[float, float]:
        """Return mean minus and plus one standard deviation of the last values.

        Returns:
            Lower and upper end, equal for a single seed.
        """
        spread = stdev(self.last) if len(self.last) > 1 else 0.0
        return mean(self.last) - spread, mean(self.last) + spread


def cells(results: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Gather results over seeds.

    Args:
        results: Records of finished runs.

    Returns:
        Cells in the order in which their first runs come.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in results:
        groups.setdefault(json.dumps([record["row"], record["settings"]]), []).append(record)
    return [
        Cell(
            row=runs[0]["row"],
            settings=dict(runs[0]["settings"]),
            seeds=[r["seed"] for r in runs],
            last=[r["last"] for r in runs],
            best=[r["best"] for r in runs],
            seconds=mean(r["seconds"] for r in runs),
            pruning_seconds=mean(r["pruning_seconds"] for r in runs),
            peak_bytes=max((r["peak_bytes"] for r in runs if r["peak_bytes"]), default=None),
        )
        for runs in groups.values()
    ]


def winners(found: Sequence[Cell], direction: str) -> list[Cell]:
    """Name, at each point of the grid, the row that is better than all others beyond their intervals.

    Args:
        found: The cells.
        direction: "maximize" or "minimize".

    Returns:
        At most one cell a point; none where intervals overlap or there is no other row.
    """
    sign = 1 if direction == "maximize" else -1
    best = []
    for point in {json.dumps(cell.settings): cell.settings for cell in found if cell.settings}.values():
        rivals = sorted((c for c in found if c.settings == point), key=lambda c: -sign * mean(c.last))
        if len(rivals) > 1 and all(len(c.last) > 1 for c in rivals):  # a single seed has no interval
            ends = [sorted(sign * end for end in c.interval()) for c in rivals]
            if all(ends[0][0] > end[1] for end in ends[1:]):
                best.append(rivals[0])
    return best


def study_table(results: Sequence[Mapping[str, Any]], metric: str, direction: str) -> str:
    """Set the rows of a study side by side.

    Args:
        results: Records of finished runs.
        metric: Name of the metric.
        direction: "maximize" or "minimize".

    Returns:
        A line for each row at each point of the grid; the best of a point between asterisks where its interval
        overlaps with no other's.
    """
    found = cells(results)
    keys = list(dict.fromkeys(key for cell in found for key in cell.settings))
    first = winners(found, direction)
    head = ["row", *(key.rpartition(".")[2] for key in keys), "seeds", f"last {metric}", f"best {metric}"]
    lines = [[*head, "pruning s", "wall s", "peak MiB"]]
    for cell in found:
        last = _spread(cell.last)
        lines.append([
            cell.row,
            *(str(cell.settings.get(key, "-")) for key in keys),
            str(len(cell.seeds)),
            f"**{last}**" if cell in first else last,
            _spread(cell.best),
            f"{cell.pruning_seconds:.2f}",
            f"{cell.seconds:.1f}",
            "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:.0f}",
        ])
    return columns(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{mean(values):.4f}"
