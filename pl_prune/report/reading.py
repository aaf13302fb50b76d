"""The files of a study or a run, read for the page of `pl_prune.report.html`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pl_prune.core.metrics import reached, read_records
from pl_prune.core.types import PruneError
from pl_prune.report.grid import Group, Run, Study
from pl_prune.report.study import cells
from pl_prune.report.words import is_number

_RECORD = ("key", "row", "settings", "seed", "best", "last", "seconds", "pruning_seconds", "peak_bytes")


def read_study(folder: Path, metric: str, direction: str) -> Study:
    """Read a study.

    Args:
        folder: Holds results.jsonl and runs/.
        metric: What decides.
        direction: "maximize" or "minimize".

    Returns:
        Its finished runs.

    Raises:
        PruneError: If there is none, a file is damaged, or no run logs the metric.
    """
    file = folder / "results.jsonl"
    records = read_records(file)
    for record in records:
        if missing := [key for key in _RECORD if key not in record]:
            raise PruneError(
                f"Expected the results of `pl-prune study` in {str(file)!r}; found a line without {', '.join(missing)}. "
                "Run the study again."
            )
        numbers = [record[key] for key in ("best", "last", "seconds", "pruning_seconds")]
        numbers += [record["peak_bytes"]] if record["peak_bytes"] is not None else []
        named = isinstance(record["row"], str) and isinstance(record["settings"], dict)
        if not named or not all(map(is_number, numbers)):
            raise PruneError(
                f"Expected a row, settings and numbers in {str(file)!r}; found something else for {record['key']!r}. Run the study again."
            )
    if not records:
        raise PruneError(f"Expected finished runs in {str(file)!r}; found none. Run the study first.")
    about = read_about(folder)
    own = deciding(folder)
    runs: dict[str, list[Run]] = {}
    for record in records:
        run = read_run(folder / "runs" / str(record["key"]), record)
        if (record.get("metric", own[0]), record.get("direction", own[1])) != (metric, direction):
            record |= reached(run.curve, metric, direction, run.folder)
        runs.setdefault(json.dumps([record["row"], record["settings"]]), []).append(run)
    groups = [Group(cell, found) for cell, found in zip(cells(records), runs.values(), strict=True)]
    name = str(about.get("name") or folder.resolve().name)
    references = _references(about, folder / "study.json")
    total, failures = about.get("total", len(records)), about.get("failures", {})
    if not is_number(total) or not isinstance(failures, dict):
        raise PruneError(
            f"Expected the record of a study in {str(folder / 'study.json')!r}; found something else. Run the study again."
        )
    searched = about.get("search") is not None
    return Study(name, groups, metric, direction, references, folder, searched, int(total), failures)


def read_about(folder: Path) -> dict[str, Any]:
    """Read what a study says of itself.

    Args:
        folder: A study's.

    Returns:
        Name, metric, direction, search and references; nothing where it has no study.json.

    Raises:
        PruneError: If the file is damaged.
    """
    file = folder / "study.json"
    try:
        return dict(json.loads(file.read_text())) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise PruneError(
            f"Expected a study's record in {str(file)!r}; found something else ({error}). Run `pl-prune study` again."
        ) from error


def deciding(folder: Path, metric: str | None = None, direction: str | None = None) -> tuple[str, str]:
    """Say by what a study is decided.

    Args:
        folder: A study's.
        metric: Taken as it is, where given.
        direction: Taken as it is, where given.

    Returns:
        Metric and direction: the study's own, else `val/acc` and `maximize`.

    Raises:
        PruneError: If the study's record is damaged.
    """
    about = read_about(folder)
    return metric or about.get("metric", "val/acc"), direction or about.get("direction", "maximize")


def _references(about: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    found = about.get("references", [])
    keys = {"row", "settings", "value", "reproduced"}
    if not isinstance(found, list) or not all(isinstance(one, dict) and keys <= set(one) for one in found):
        raise PruneError(f"Expected the record of a study in {str(file)!r}; found something else. Run the study again.")
    return found


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
    units = report.get("units")
    sliced = isinstance(units, dict) and bool(units.get("sliced")) and not report.get("sparsity")
    layers, cost, latency = report.get("layers", []), report.get("cost", {}), report.get("latency") or {}
    smaller = units.get("cost", {}) if isinstance(units, dict) and not units.get("sliced") else {}
    if sliced:
        layers = _of_units(units)
    if (
        not isinstance(layers, list)
        or not all(map(_is_layer, layers))
        or not all(isinstance(counts, dict) and all(map(is_number, counts.values())) for counts in (cost, smaller))
        or not _is_latency(latency)
    ):
        raise PruneError(
            f"Expected the report of SparsityReport in {str(file)!r}; found something else. Run the fit again."
        )
    metrics = folder / "metrics.jsonl"
    curve = read_records(metrics) if metrics.is_file() else []
    return Run(folder, record, layers, cost, report.get("path"), curve, latency, sliced, smaller)


def _of_units(units: Any) -> list[dict[str, Any]] | None:
    """Describe units, of which some are gone, as layers are; None where that is not what they are."""
    try:
        return [
            {"name": name, "shape": [total], "kept": kept, "total": total, "empty_rows": total - kept}
            for name, (kept, total) in units["layers"].items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _is_layer(layer: Any) -> bool:
    return (
        isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and isinstance(layer.get("shape"), list)
        and all(is_number(layer.get(key)) for key in ("kept", "total", "empty_rows"))
    )


def _is_latency(latency: Any) -> bool:
    return latency == {} or (
        isinstance(latency, dict)
        and {"device", "threads", "batch"} <= set(latency)
        and all(isinstance(latency.get(kind), list) and len(latency[kind]) == 3 for kind in ("dense", "masked"))
        and all(is_number(value) and value > 0 for kind in ("dense", "masked") for value in latency[kind])
    )


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
