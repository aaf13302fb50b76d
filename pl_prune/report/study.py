"""The table of a study: mean and standard deviation over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import mean
from typing import Any

from pl_prune.report.table import Strong, Table
from pl_prune.report.words import spread, text_of


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
        wide = spread(self.last)
        return mean(self.last) - wide, mean(self.last) + wide


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


def summary(results: Sequence[Mapping[str, Any]], direction: str) -> list[dict[str, Any]]:
    """Return the cells as plain data.

    Args:
        results: Records of finished runs.
        direction: "maximize" or "minimize".

    Returns:
        The fields of each cell, mean and standard deviation of its values (None for a single seed), and whether it won.
    """
    found = cells(results)
    first = winners(found, direction)
    return [
        {
            **asdict(cell),
            **{f"{name}_mean": mean(values) for name, values in (("last", cell.last), ("best", cell.best))},
            **{
                f"{name}_std": spread(values) if len(values) > 1 else None
                for name, values in (("last", cell.last), ("best", cell.best))
            },
            "won": cell in first,
        }
        for cell in found
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
    gridless = not any(cell.settings for cell in found)
    for point in dict.fromkeys(json.dumps(cell.settings) for cell in found if cell.settings or gridless):
        rivals = [c for c in found if json.dumps(c.settings) == point and all(map(isfinite, c.last))]
        rivals.sort(key=lambda c: -sign * mean(c.last))
        if len(rivals) > 1 and all(len(c.last) > 1 for c in rivals):  # a single seed has no interval
            ends = [sorted(sign * end for end in c.interval()) for c in rivals]
            if all(ends[0][0] > end[1] for end in ends[1:]):
                best.append(rivals[0])
    return best


def study_table(
    results: Sequence[Mapping[str, Any]],
    metric: str,
    direction: str,
    references: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Set the rows of a study side by side, as plain text.

    Args:
        results: Records of finished runs.
        metric: Name of the metric.
        direction: "maximize" or "minimize".
        references: As for `standings`.

    Returns:
        `standings`, the best of a point between asterisks.
    """
    return standings(results, metric, direction, references).text()


def standings(
    results: Sequence[Mapping[str, Any]],
    metric: str,
    direction: str,
    references: Sequence[Mapping[str, Any]] = (),
) -> Table:
    """Set the rows of a study side by side.

    Args:
        results: Records of finished runs.
        metric: Name of the metric.
        direction: "maximize" or "minimize".
        references: Values that a paper reports, as it prints them, and its rows that cannot be run: `Plan.references`.

    Returns:
        A line for each row at each point of the grid; the best of a point stands out where its interval overlaps with
        no other's; then a line for each row that is not reproduced.
    """
    found = cells(results)
    absent = [r for r in references if not r["reproduced"]]
    printed = {_place(r["row"], r["settings"]): r["value"] or "-" for r in references}
    points = [*(cell.settings for cell in found), *(r["settings"] for r in absent)]
    keys = list(dict.fromkeys(key for point in points for key in point))
    first = winners(found, direction)
    head = ["row", *(key.rpartition(".")[2] for key in keys), "seeds", f"last {metric}", f"best {metric}"]
    paper = any(r["value"] for r in references)
    head += [*(["paper"] if paper else []), "pruning s", "wall s", "peak MiB"]
    lines = []
    for cell in found:
        last = text_of(cell.last)
        lines.append([
            cell.row,
            *(str(cell.settings.get(key, "-")) for key in keys),
            str(len(cell.seeds)),
            Strong(last) if cell in first else last,
            text_of(cell.best),
            *([printed.get(_place(cell.row, cell.settings), "-")] if paper else []),
            f"{cell.pruning_seconds:.2f}",
            f"{cell.seconds:.1f}",
            "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:.0f}",
        ])
    for r in absent:
        point = [str(r["settings"].get(key, "-")) for key in keys]
        lines.append([
            r["row"],
            *point,
            "0",
            "not reproduced",
            "-",
            *([r["value"] or "-"] if paper else []),
            *["-"] * 3,
        ])
    return Table(head, lines)


def _place(row: str, settings: Mapping[str, Any]) -> str:
    return json.dumps([row, settings], sort_keys=True)
