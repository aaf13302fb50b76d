"""A study or a run as its files tell it, for the page of `pl_prune.report.html`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pl_prune.core.types import PruneError
from pl_prune.report.study import Cell, cells

_RECORD = ("key", "row", "settings", "seed", "best", "last", "seconds", "pruning_seconds", "peak_bytes")
_LAYER = ("name", "shape", "kept", "total", "empty_rows")


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        folder: Where its files are.
        record: Its line of results.jsonl, or its result.json.
        layers: Layers of report.json; none where it is missing.
        cost: Whole-model counts of report.json.
        path: Whether an input reaches the output; None where nobody knows.
        curve: A record for each epoch; none where metrics.jsonl is missing.
    """

    folder: Path
    record: dict[str, Any]
    layers: list[dict[str, Any]]
    cost: dict[str, float]
    path: bool | None
    curve: list[dict[str, float]]


@dataclass(frozen=True)
class Group:
    """The runs of one row at one point of the grid.

    Args:
        cell: Their numbers, as in the table.
        runs: The runs, in the order of the cell's seeds.
    """

    cell: Cell
    runs: list[Run]

    @property
    def finite(self) -> bool:
        """Whether no run ended in a NaN or an infinity."""
        return all(map(isfinite, self.cell.last))

    @property
    def dense(self) -> bool:
        """Whether it stands outside the grid and nothing is pruned."""
        return not self.cell.settings and all(not run.record.get("sparsity") for run in self.runs)

    def average(self, value: Callable[[Run], float | None]) -> float | None:
        """Average something over the runs that have it.

        Args:
            value: Takes it from a run.

        Returns:
            The mean; None where no run has it.
        """
        found = [v for run in self.runs if (v := value(run)) is not None]
        return mean(found) if found else None


@dataclass(frozen=True)
class Study:
    """All finished runs of a study.

    Args:
        name: Of its folder.
        groups: Runs by row and point.
        metric: What decides.
        direction: "maximize" or "minimize".
    """

    name: str
    groups: list[Group] = field(repr=False)
    metric: str
    direction: str

    @cached_property
    def rows(self) -> list[str]:
        """Row names, in order; their places decide colours."""
        return list(dict.fromkeys(group.cell.row for group in self.groups))

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the grid."""
        return list(dict.fromkeys(key for group in self.groups for key in group.cell.settings))

    @cached_property
    def axis(self) -> str | None:
        """The first key of the grid whose values are numbers and vary, else the first with numbers."""
        values = {key: [g.cell.settings[key] for g in self.groups if key in g.cell.settings] for key in self.keys}
        numeric = [key for key, found in values.items() if all(map(_is_number, found))]
        return next((key for key in numeric if len(set(values[key])) > 1), numeric[0] if numeric else None)

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """Points of the grid: along the axis where there is one, else in order."""
        found = list({json.dumps(g.cell.settings): g.cell.settings for g in self.groups if not g.dense}.values())
        axis = self.axis
        return sorted(found, key=lambda point: point.get(axis, 0)) if axis else found

    @cached_property
    def dense(self) -> Group | None:
        """The dense row, if there is one."""
        return next((group for group in self.groups if group.dense), None)

    def short(self, key: str) -> str:
        """Return a key without its path, unless another one ends alike.

        Args:
            key: Dotted key.

        Returns:
            What to call it.
        """
        last = key.rpartition(".")[2]
        return key if sum(other.rpartition(".")[2] == last for other in self.keys) > 1 else last

    def label(self, point: dict[str, Any]) -> str:
        """Return a point of the grid in words.

        Args:
            point: Its settings.

        Returns:
            "sparsity 0.9, lr 0.1"; "the study's only point" where there is no grid.
        """
        words = [f"{self.short(key)} {abbreviate(show(value), 30)}" for key, value in point.items()]
        return ", ".join(words) or ("the rows outside the grid" if self.keys else "the only point")

    def at(self, point: dict[str, Any]) -> list[Group]:
        """Return the rows at a point.

        Args:
            point: Its settings.

        Returns:
            Groups; the dense row is not among them.
        """
        return [group for group in self.groups if group.cell.settings == point and not group.dense]

    @cached_property
    def shown(self) -> list[dict[str, Any]]:
        """The sparsest point, then the densest if it is another one: where figures of one point look."""

        def sparsity(point: dict[str, Any]) -> float:
            found = [g.average(lambda run: run.record.get("sparsity")) for g in self.at(point)]
            return mean([s for s in found if s is not None] or [0.0])

        points = sorted((p for p in self.points if p or not self.keys), key=sparsity)
        return [points[-1], points[0]] if len(points) > 1 else points


def read_study(folder: Path, metric: str, direction: str) -> Study:
    """Read a study.

    Args:
        folder: Holds results.jsonl and runs/.
        metric: What decides.
        direction: "maximize" or "minimize".

    Returns:
        Its finished runs.

    Raises:
        PruneError: If there is none, or a file is damaged.
    """
    file = folder / "results.jsonl"
    records = read_lines(file)
    for record in records:
        if missing := [key for key in _RECORD if key not in record]:
            raise PruneError(
                f"Expected the results of `pl-prune study` in {str(file)!r}; found a line without {', '.join(missing)}. "
                "Run the study again."
            )
        numbers = [record[key] for key in ("best", "last", "seconds", "pruning_seconds")]
        if not isinstance(record["settings"], dict) or not all(map(_is_number, numbers)):
            raise PruneError(
                f"Expected settings and numbers in {str(file)!r}; found something else for {record['key']!r}. Run the study again."
            )
    if not records:
        raise PruneError(f"Expected finished runs in {str(file)!r}; found none. Run the study first.")
    runs: dict[str, list[Run]] = {}
    for record in records:
        run = read_run(folder / "runs" / str(record["key"]), record)
        runs.setdefault(json.dumps([record["row"], record["settings"]]), []).append(run)
    groups = [Group(cell, found) for cell, found in zip(cells(records), runs.values(), strict=True)]
    return Study(folder.resolve().name, groups, metric, direction)


def read_run(folder: Path, record: dict[str, Any]) -> Run:
    """Read what else a run has written.

    Args:
        folder: Its folder; files that are not there are done without.
        record: Its result.

    Returns:
        The run.

    Raises:
        PruneError: If a file is damaged.
    """
    file = folder / "report.json"
    report = read_json(file) if file.is_file() else {}
    layers, cost = report.get("layers", []), report.get("cost", {})
    if (
        not isinstance(layers, list)
        or not isinstance(cost, dict)
        or not all(isinstance(layer, dict) and all(key in layer for key in _LAYER) for layer in layers)
    ):
        raise PruneError(
            f"Expected the report of SparsityReport in {str(file)!r}; found something else. Run the fit again."
        )
    metrics = folder / "metrics.jsonl"
    curve = read_lines(metrics) if metrics.is_file() else []
    return Run(folder, record, layers, cost, report.get("path"), curve)


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds one record.

    Args:
        file: Its path.

    Returns:
        The record.

    Raises:
        PruneError: If it holds anything else.
    """
    return _parse(file.read_text(errors="replace"), file)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file with a record on each line.

    Args:
        file: Its path.

    Returns:
        The records; a last line that was cut off by a crash is left out.

    Raises:
        PruneError: If another line holds anything else.
    """
    lines = file.read_text(errors="replace").splitlines(keepends=True)
    return [_parse(line, file) for line in lines if line.endswith("\n") and line.strip()]


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            return content
        raise ValueError(f"a {type(content).__name__}")
    except ValueError as error:
        raise PruneError(
            f"Expected a JSON record in {str(file)!r}; found something else ({error}). Delete the file and run again."
        ) from error


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
