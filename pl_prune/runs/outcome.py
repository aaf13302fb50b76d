"""What a finished run of a study reached: a line of its results, and weights for other runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from pl_prune.core.metrics import reached
from pl_prune.core.types import PruneError
from pl_prune.runs.asked import asked
from pl_prune.runs.folder import RunFolder
from pl_prune.runs.spec import Spec
from pl_prune.runs.stages import handed

_KEPT = ("method", "sparsity", "masks", "seconds", "pruning_seconds", "peak_bytes", "epochs", "steps")


def outcome(spec: Spec, run: RunFolder, metric: str, direction: Literal["maximize", "minimize"]) -> dict[str, Any]:
    """Read what a run reached.

    Args:
        spec: The run.
        run: Its folder.
        metric: The metric that decides.
        direction: Whether the best epoch is the one where it is greatest or smallest.

    Returns:
        Key, row, settings, seed, what was asked, the metric after the best and after the last epoch, times, memory,
        sparsity, the fraction of parameters that was sliced off, digest of the masks, folder.

    Raises:
        PruneError: If the run is not finished, or does not log the metric.
    """
    result = run.result()
    return {
        "key": spec.key,
        "row": spec.row,
        "settings": spec.settings,
        "seed": spec.seed,
        "asked": asked(spec),
        **reached(run.metrics(), metric, direction, run.path),
        **{name: result[name] for name in _KEPT},
        "removed": result.get("removed", 0.0),
        "folder": str(run.path),
    }


def by_metric(
    record: dict[str, Any], run: RunFolder, metric: str, direction: Literal["maximize", "minimize"]
) -> dict[str, Any]:
    """Return a line of results by the metric that decides now.

    Args:
        record: The line, by the metric that decided when the run was done.
        run: The run's folder.
        metric: The metric.
        direction: Whether the best epoch is the one where it is greatest or smallest.

    Returns:
        The line, read again from the run's metrics where the metric or the direction is another one.

    Raises:
        MetricMissing: If the run does not log the metric.
    """
    if (record.get("metric"), record.get("direction")) == (metric, direction):
        return record
    return {**record, **reached(run.metrics(), metric, direction, run.path)}


def best_of_rows(results: Sequence[dict[str, Any]], direction: Literal["maximize", "minimize"]) -> list[dict[str, Any]]:
    """Name the best result of each row, by the last value of the metric.

    Args:
        results: Lines of results.
        direction: Whether the greatest or the smallest is best.

    Returns:
        One for each row that has a finite value; the first of equal ones.
    """
    sign = 1 if direction == "maximize" else -1
    found: dict[str, dict[str, Any]] = {}
    for record in results:
        rival = found.get(record["row"])
        if isfinite(record["last"]) and (rival is None or sign * record["last"] > sign * rival["last"]):
            found[record["row"]] = record
    return list(found.values())


def with_source(spec: Spec, folder: Path) -> Spec:
    """Start a run from the last weights of the run that it names, and keep it to that run's masks where it asks for them.

    Args:
        spec: The run.
        folder: The study's folder.

    Returns:
        The run with these weights and masks; itself where it starts from scratch. One that has a checkpoint takes masks alone.

    Raises:
        PruneError: If that run has left no checkpoint there, or no masks.
    """
    if spec.weights_of is None:
        return spec
    source = RunFolder(folder / "runs" / spec.weights_of)
    if source.checkpoint is None:
        raise PruneError(
            f"Expected the last checkpoint of {spec.weights_of!r} in {str(source.path)!r}; found none. "
            "Give all machines one folder, or copy that run's to this one."
        )
    return handed(spec, source.path, spec.masks, RunFolder(folder / "runs" / spec.key).checkpoint is not None)


def cause_of(error: BaseException) -> BaseException:
    """Find the refusal of ours that jsonargparse has wrapped in an error of its own.

    Args:
        error: What was raised.

    Returns:
        The refusal; the error itself where there is none.
    """
    cause: BaseException | None = error if isinstance(error, ValueError) else None
    while cause is not None and not isinstance(cause, PruneError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
