"""Tables, and the report of a pruned network, as text and as plain data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from pl_prune.core.types import PruneError
from pl_prune.report.cost import Cost
from pl_prune.report.sparsity import LayerSparsity
from pl_prune.report.units import HEAD, Units, unit_rows


class Strong(str):
    """A cell that won: between asterisks in plain text, bold on a terminal."""


class Alarm(str):
    """A cell or a line that warns: red on a terminal."""


@dataclass(frozen=True)
class Table:
    """Rows under a head.

    Args:
        head: A name for each column.
        rows: A cell for each column.

    Attributes:
        code: Whether backticks set off code in its cells.
    """

    code: ClassVar[bool] = False
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Write it in aligned columns.

        Returns:
            One line a row.
        """
        rows = [[f"**{cell}**" if isinstance(cell, Strong) else cell for cell in row] for row in self.rows]
        return columns([self.head, *rows])


@dataclass(frozen=True)
class Facts:
    """Labels, each with what there is to say.

    Args:
        pairs: Label and text.
    """

    pairs: Sequence[tuple[str, str]]

    def text(self) -> str:
        """Write a line for each.

        Returns:
            The labels in a column of their own.
        """
        width = max((len(label) for label, _ in self.pairs), default=0)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in self.pairs)


Part: TypeAlias = Table | Facts | str
"""What a command shows, one below the other; `pl_prune.report.terminal.show` renders it."""


def as_text(parts: Sequence[Part]) -> str:
    """Write parts as plain text.

    Args:
        parts: Tables, facts and lines.

    Returns:
        One below the other.
    """
    return "\n".join(part if isinstance(part, str) else part.text() for part in parts)


@dataclass(frozen=True)
class PruningReport:
    """Everything the package says about one pruned network.

    Args:
        method: How it was pruned, in one line.
        layers: Every prunable parameter.
        cost: Whole-model counts.
        path: Whether an input reaches the output through kept weights; None where that could not be found out.
        zeros: Measured zeros among the prunable weights; at least the pruned entries.
        metrics: Last logged metrics of the run.
        units: What is left of whole units, where those are pruned.
    """

    method: str
    layers: Sequence[LayerSparsity]
    cost: Cost
    path: bool | None
    zeros: int
    metrics: dict[str, float] = field(default_factory=dict)
    units: Units | None = None

    @property
    def kept(self) -> int:
        """Kept entries of the prunable parameters."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """Entries of the prunable parameters."""
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Pruned fraction of the prunable parameters."""
        return (self.total - self.kept) / self.total if self.total else 0.0

    @property
    def removed(self) -> float:
        """Fraction of the network's parameters that have been sliced off."""
        return self.units.removed if self.units else 0.0

    def collapsed(self) -> list[str]:
        """Name the layers of which nothing is left.

        Returns:
            Parameter names.
        """
        return [layer.name for layer in self.layers if layer.collapsed]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for a file.

        Returns:
            What `json.dumps` takes.
        """
        layers = [
            {
                **asdict(layer),
                "density": layer.density,
                "collapsed": layer.collapsed,
                "bottleneck": layer.bottleneck,
            }
            for layer in self.layers
        ]
        return {**asdict(self), "layers": layers, "sparsity": self.sparsity, "removed": self.removed}

    def text(self) -> str:
        """Return the layer table and the summary as plain text.

        Returns:
            Lines of at most about 110 characters.
        """
        return as_text(self.parts())

    def parts(self) -> list[Part]:
        """Return the layer table and the summary.

        Returns:
            What `show` renders.
        """
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.kept:,} / {layer.total:,}",
                f"{layer.density:.2%}",
                f"{layer.empty_rows}/{layer.shape[0]}",
                f"{layer.empty_cols}/{layer.shape[1] if len(layer.shape) > 1 else layer.shape[0]}",
                "-" if layer.kernel_sparsity is None else f"{layer.kernel_sparsity:.1%}",
                Alarm("COLLAPSED") if layer.collapsed else "bottleneck" if layer.bottleneck else "",
            )
            for layer in self.layers
        ]
        head = ("prunable parameter", "shape", "kept", "density", "empty rows", "empty cols", "empty kernels", "")
        path = {True: "yes", False: Alarm("NO: no input reaches the output"), None: "unknown"}[self.path]
        cost = self.cost
        bottlenecks = sum(layer.bottleneck and not layer.collapsed for layer in self.layers)
        summary = [
            ("method", self.method),
            *([("units", self.units.text())] if self.units else []),
            (
                "prunable parameters",
                f"{self.kept:,} of {self.total:,} kept (sparsity {self.sparsity:.4f}); {self.zeros:,} zeros measured",
            ),
            (
                "whole model",
                f"{cost.params_kept:,} of {cost.params:,} parameters kept ({1 - cost.params_kept / cost.params:.2%} pruned)",
            ),
            (
                "MACs per sample",
                f"{cost.macs_kept:,} of {cost.macs:,} ({cost.macs_kept / max(cost.macs, 1):.2%})"
                + ("" if self.units and self.units.sliced else "; a count: masked weights alone save no time"),
            ),
            (
                "layers",
                f"{len(self.collapsed())} collapsed, {bottlenecks} bottlenecks (at least 80 % gone), of {len(self.layers)}",
            ),
            ("path input to output", path),
        ]
        units: list[Part] = [Table(HEAD, unit_rows(self.units.layers)), ""] if self.units else []
        return [Table(head, rows), "", *units, Facts(summary)]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns, the first to the left and the rest to the right, under a ruled head.

    Args:
        rows: The head, then the body.

    Returns:
        One line a row.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def compare(folders: Sequence[str | Path]) -> str:
    """Set finished runs side by side, as plain text.

    Args:
        folders: Folders that hold a `report.json` of `SparsityReport`.

    Returns:
        A table with a row for each run and a column for each metric that all of them have.
    """
    return comparison(read_runs(folders)).text()


def read_runs(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Read what finished runs are compared by.

    Args:
        folders: Folders that hold a `report.json` of `SparsityReport`.

    Returns:
        Folder, sparsity, fraction that was sliced off, counts and metrics of each.

    Raises:
        PruneError: If there is no folder, or one holds no report.
    """
    runs = []
    for folder in folders:
        file = Path(folder) / "report.json"
        if not file.is_file():
            fix = "Add the callback SparsityReport to the run." if Path(folder).is_dir() else "Look at the path."
            found = "none" if Path(folder).is_dir() else "no such folder"
            raise PruneError(f"Expected a finished run's report at {file}; found {found}. {fix}")
        try:
            report = json.loads(file.read_text())
            counts = {key: report["cost"][key] for key in ("params", "params_kept", "macs", "macs_kept")}
            metrics = dict(report["metrics"])
            pruned = {"sparsity": report["sparsity"], "removed": report.get("removed", 0.0)}
            runs.append({"run": str(folder), **pruned, **counts, "metrics": metrics})
        except (ValueError, KeyError, TypeError) as error:
            raise PruneError(
                f"Expected the report of SparsityReport in {file}; found something else ({error!r}). Run the fit again."
            ) from error
    if not runs:
        raise PruneError("Expected at least one run folder; found none. Name the folders of finished runs.")
    return runs


def comparison(runs: Sequence[dict[str, Any]]) -> Table:
    """Set finished runs side by side.

    Args:
        runs: What `read_runs` returns.

    Returns:
        A row for each run and a column for each metric that all of them have; one for what was sliced off, if anything was.
    """
    sliced = any(run["removed"] for run in runs)
    shared = [m for m in runs[0]["metrics"] if all(m in run["metrics"] for run in runs)]
    rows = [
        (
            run["run"],
            f"{run['sparsity']:.4f}",
            *([f"{run['removed']:.4f}"] if sliced else []),
            f"{run['params_kept']:,}",
            f"{run['macs_kept']:,}",
            *(f"{run['metrics'][m]:.4f}" for m in shared),
        )
        for run in runs
    ]
    head = ("run", "sparsity", *(["sliced off"] if sliced else []), "params kept", "MACs kept", *shared)
    return Table(head, rows)
