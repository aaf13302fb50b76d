"""`as_sweep`: a study as a sweep file of Weights & Biases."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from pl_prune.core.types import PruneError
from pl_prune.runs.plan import Plan
from pl_prune.runs.search import Range
from pl_prune.runs.spec import arguments


def as_sweep(plan: Plan) -> dict[str, Any]:
    """Return the same grid or search as a wandb sweep.

    A grid becomes the method "grid". A search becomes "bayes" or "random" over all its rows together, with as many runs
    as the study has points.

    Args:
        plan: The study.

    Returns:
        The content of a sweep file.

    Raises:
        PruneError: If rows set anything but the pruning callback, start from another row's weights, or are several in a
            search over the callback's own settings: a sweep cannot vary those together.
    """
    for name in plan.rows:
        if source := plan.source(name):
            raise PruneError(
                f"Expected rows that start from scratch, for a sweep; found weights_of or masks_of {source!r} in row {name!r}. "
                "Leave that row out, or run the study itself."
            )
    if early := [key for key in plan.set if key.startswith("prune.") and "prune" not in plan.set]:
        raise PruneError(
            "Expected settings under prune in the rows or in the grid, for a sweep, which chooses the callback last; "
            f"found {early[0]!r} in `set`. Write it into each row that takes it."
        )
    varied = plan.search.space if plan.search else plan.grid
    fixed = [name for name in plan.rows if not plan.varies(name)]
    if fixed and (plan.search or any(not key.startswith("prune.") and len(v) > 1 for key, v in plan.grid.items())):
        raise PruneError(
            f"Expected rows that all take {', '.join(varied)}, for a sweep, which knows no row outside; found {fixed[0]!r}. "
            "Leave that row out, or run the study itself."
        )
    if plan.search is None:
        outer = {key: {"values": v} for key, v in plan.grid.items() if not key.startswith("prune.")}
        inner = {key: v for key, v in plan.grid.items() if key.startswith("prune.")}
        return _sweep(plan, "grid", {"prune": {"values": _prunings(plan, inner)}, **outer})
    space = {key: _parameter(dimension) for key, dimension in plan.search.space.items()}
    method = "bayes" if plan.search.sampler == "tpe" else "random"
    searched = [name for name in plan.rows if plan.varies(name)]
    if not any(key.startswith("prune.") for key in space):
        sweep = _sweep(plan, method, {"prune": {"values": _prunings(plan, {})}, **space})
    elif len(plan.rows) == 1:
        sweep = _sweep(plan, method, space, plan.rows[searched[0]])
    else:
        raise PruneError(
            f"Expected one row for a sweep that searches {', '.join(k for k in space if k.startswith('prune.'))}; "
            f"found {', '.join(plan.rows)}. Write a study of one row for each sweep, or run the study itself."
        )
    return {**sweep, "run_cap": plan.search.points * len(searched)}


def _sweep(plan: Plan, method: str, parameters: dict[str, Any], row: Mapping[str, Any] | None = None) -> dict[str, Any]:
    row = row or {"config": []}
    files = [word for file in (*plan.config, *row["config"]) for word in ("--config", file)]
    sets = arguments({**plan.set, **(row.get("set") or {})})
    return {
        "program": "pl-prune",
        "method": method,
        "metric": {"name": plan.metric, "goal": plan.direction},
        "command": ["${env}", "${program}", "fit", *files, *sets, "--config", "${args_json_file}"],
        "parameters": {**parameters, "seed_everything": {"values": list(plan.seeds)}},
    }


def _parameter(dimension: list[Any] | Range) -> dict[str, Any]:
    """Return a dimension of the search as wandb writes it."""
    if isinstance(dimension, list):
        return {"values": dimension}
    ends = {"min": dimension.low, "max": dimension.high}
    if dimension.log:
        return {"distribution": "q_log_uniform_values" if dimension.whole else "log_uniform_values", **ends}
    if dimension.step is not None:
        return {"distribution": "q_uniform", "q": dimension.step, **ends}
    return {"distribution": "int_uniform" if dimension.whole else "uniform", **ends}


def _prunings(plan: Plan, grid: Mapping[str, list[Any]]) -> list[Any]:
    """Return every row's pruning callback at every point of the grid below it."""
    values = []
    for name, row in plan.rows.items():
        prune = _pruning(name, row)
        swept = grid if plan.varies(name) else {}
        for point in itertools.product(*swept.values()):
            values.append(_with(prune, dict(zip(swept, point, strict=True))))
    return values


def _pruning(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's pruning callback as class path and arguments."""
    merged: dict[str, Any] = {}
    for file in row["config"]:
        merged.update(yaml.safe_load(Path(file).read_text()))
    settings = dict(row.get("set") or {})
    prune = settings.pop("prune", merged.pop("prune", None))
    if merged or prune is None or any(not key.startswith("prune.") for key in settings):
        raise PruneError(
            f"Expected rows that choose the pruning callback alone, for a sweep; found {sorted({*merged, *settings})} in row {name!r}. "
            "Write that sweep by hand, or move those settings to `set`."
        )
    prune = {"class_path": prune} if isinstance(prune, str) else prune
    return _with(prune, settings)


def _with(prune: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted keys below `prune` in a copy."""
    made: dict[str, Any] = json.loads(json.dumps(prune))
    for key, value in settings.items():
        place = made.setdefault("init_args", {})
        *path, last = key.split(".")[1:]
        for part in path:
            inner = place.get(part) or {}
            place[part] = inner = {"class_path": inner} if isinstance(inner, str) else inner
            place = inner.setdefault("init_args", {}) if "class_path" in inner else inner  # a class, or plain settings
        place[last] = value
    return made
