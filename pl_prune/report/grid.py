"""`Study`: finished runs by row and point of the grid, for the page of `pl_prune.report.html`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from pl_prune.report.study import Cell
from pl_prune.report.words import abbreviate, is_number, show


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        folder: Where its files are.
        record: Its line of results.jsonl, or its result.json.
        layers: Layers of report.json, of a network that lost units those; none where it is missing.
        cost: Whole-model counts of report.json.
        path: Whether an input reaches the output; None where nobody knows.
        curve: A record for each epoch; none where metrics.jsonl is missing.
        latency: Measured latency of report.json; none where it was not asked for.
        sliced: Whether units have been sliced off, and nothing of what is left is masked.
        smaller: Whole-model counts of what slicing masked units off would leave; none where no units are masked.
    """

    folder: Path
    record: dict[str, Any]
    layers: list[dict[str, Any]]
    cost: dict[str, float]
    path: bool | None
    curve: list[dict[str, float]]
    latency: dict[str, Any] = field(default_factory=dict)
    sliced: bool = False
    smaller: dict[str, float] = field(default_factory=dict)

    @property
    def pruned(self) -> float | None:
        """Fraction of parameters that are zero (of the prunable ones) or sliced off (of all); None where nobody knows."""
        sparsity, removed = self.record.get("sparsity"), self.record.get("removed", 0.0)
        return None if sparsity is None else float(1 - (1 - sparsity) * (1 - removed))


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
        return not self.cell.settings and all(not run.pruned for run in self.runs)

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
        name: What it is called.
        groups: Runs by row and point.
        metric: What decides.
        direction: "maximize" or "minimize".
        references: What a paper reports for its rows, as the study's file has it: row, settings, value, reproduced.
        folder: Where it is.
        searched: Whether each row's points were proposed one after another, so that rows do not meet at points.
        total: Runs that it is to have.
        failures: What went wrong in runs that are not finished, by key.
    """

    name: str
    groups: list[Group] = field(repr=False)
    metric: str
    direction: str
    references: list[dict[str, Any]] = field(default_factory=list, repr=False)
    folder: Path = field(default=Path(), repr=False)
    searched: bool = False
    total: int = 0
    failures: dict[str, str] = field(default_factory=dict, repr=False)

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
        numeric = [key for key, found in values.items() if all(map(is_number, found))]
        return next((key for key in numeric if len(set(values[key])) > 1), numeric[0] if numeric else None)

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """Points of the grid: along the axis where there is one, else in order."""
        found = list(
            {json.dumps(g.cell.settings): g.cell.settings for g in self.groups if g is not self.dense}.values()
        )
        axis = self.axis
        return sorted(found, key=lambda point: point.get(axis, 0)) if axis else found

    @cached_property
    def dense(self) -> Group | None:
        """The dense row, if there is one."""
        found = [group for group in self.groups if group.dense]
        return found[0] if found and len(self.groups) > len(found) else None

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
        return [group for group in self.groups if group.cell.settings == point and group is not self.dense]

    @cached_property
    def shown(self) -> list[dict[str, Any]]:
        """The sparsest point, then the densest if it is another one: where figures of one point look."""

        def sparsity(point: dict[str, Any]) -> float:
            found = [g.average(lambda run: run.pruned) for g in self.at(point)]
            return mean([s for s in found if s is not None] or [0.0])

        points = sorted((p for p in self.points if p or not self.keys), key=sparsity)
        return [points[-1], points[0]] if len(points) > 1 else points
