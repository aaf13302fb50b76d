"""`Plan`: the runs of a study, from its file."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from pl_prune.core.types import PruneError

_KEYS = {"name", "metric", "direction", "config", "set", "rows", "grid", "seeds"}
_ROW_KEYS = {"config", "set", "grid"}


@dataclass(frozen=True)
class Spec:
    """One run of a study.

    Args:
        key: Its name, and that of its folder.
        row: The row of the table that it belongs to.
        settings: The point of the grid.
        seed: The seed.
        config: Configuration files, later ones over earlier ones.
        values: Every setting over those files, by dotted key.
    """

    key: str
    row: str
    settings: dict[str, Any]
    seed: int
    config: tuple[str, ...]
    values: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a study file asks for: every row at every point of the grid with every seed.

    Args:
        name: Names the study and its folder.
        rows: Row name -> configuration files, settings, and whether the grid applies to it.
        grid: Dotted key -> values.
        seeds: Seeds of every point.
        metric: The logged metric that decides.
        direction: Whether it is to be "maximize"d or "minimize"d.
        config: Configuration files of all rows.
        set: Settings of all rows, by dotted key.
    """

    name: str
    rows: dict[str, dict[str, Any]]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    metric: str = "val/acc"
    direction: Literal["maximize", "minimize"] = "maximize"
    config: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a study file.

        Args:
            path: A YAML file.

        Returns:
            The plan; configuration files are found from the working folder, else from the study file's.

        Raises:
            PruneError: If the file is missing, is not YAML, has an unknown key, or names a file that is not there.
        """
        file = Path(path)
        try:
            content = yaml.safe_load(file.read_text())
        except FileNotFoundError as error:
            raise PruneError(f"Expected a study file at {str(file)!r}; found none. Look at the path.") from error
        except yaml.YAMLError as error:
            raise PruneError(f"Expected YAML in {str(file)!r}; found {error}. Mend the file.") from error
        if not isinstance(content, dict):
            raise PruneError(
                f"Expected the keys {', '.join(sorted(_KEYS))} in {str(file)!r}; found {type(content).__name__}. Write them."
            )
        _check_keys(content, _KEYS, str(file))
        rows = content.get("rows")
        if not isinstance(rows, dict) or not rows:
            raise PruneError(
                f"Expected rows, name: {{config, set}}, in {str(file)!r}; found {rows!r}. Write at least one."
            )
        rows = {str(name): dict(row or {}) for name, row in rows.items()}
        for name, row in rows.items():
            _check_keys(row, _ROW_KEYS, f"row {name!r}")
            row["config"] = _files(row.get("config"), file, f"row {name!r}")
        grid = content.get("grid") or {}
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise PruneError(f"Expected a list of values for grid.{key}; found {values!r}. Put them in brackets.")
        seeds = content.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) for s in seeds):
            raise PruneError(f"Expected seeds to be a list of whole numbers; found {seeds!r}. Write seeds: [0, 1, 2].")
        direction = content.get("direction", "maximize")
        if direction not in ("maximize", "minimize"):
            raise PruneError(f"Expected direction to be 'maximize' or 'minimize'; found {direction!r}. Choose one.")
        return cls(
            name=str(content.get("name", file.stem)),
            rows=rows,
            grid=grid,
            seeds=tuple(seeds),
            metric=content.get("metric", "val/acc"),
            direction=direction,
            config=tuple(_files(content.get("config"), file, "config")),
            set=content.get("set") or {},
        )

    def points(self, row: str) -> list[dict[str, Any]]:
        """List the points of the grid that a row takes.

        Args:
            row: Its name.

        Returns:
            Settings by dotted key; a single empty one for a row outside the grid.
        """
        if self.rows[row].get("grid", True) is False:
            return [{}]
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def specs(self) -> list[Spec]:
        """List the runs, seed after seed, so that a study that is cut short has all rows.

        Returns:
            One for each row, point and seed.

        Raises:
            PruneError: If two have the same name.
        """
        specs = [
            Spec(
                key=_key(row, point, seed),
                row=row,
                settings=point,
                seed=seed,
                config=(*self.config, *self.rows[row]["config"]),
                values={**self.set, **(self.rows[row].get("set") or {}), **point, "seed_everything": seed},
            )
            for seed in self.seeds
            for row in self.rows
            for point in self.points(row)
        ]
        if len({spec.key for spec in specs}) < len(specs):
            keys = [spec.key for spec in specs]
            raise PruneError(
                f"Expected every run of the study to have a name of its own; found {max(keys, key=keys.count)!r} more than once. "
                "Rename a row, or leave out equal values and seeds."
            )
        return specs

    def sweep(self) -> dict[str, Any]:
        """Return the same grid as a wandb sweep.

        Returns:
            The content of a sweep file.

        Raises:
            PruneError: If rows set anything but the pruning callback, which a sweep cannot vary with them.
        """
        values: list[Any] = []
        outer = {key: v for key, v in self.grid.items() if not key.startswith("prune.")}
        inner = {key: v for key, v in self.grid.items() if key.startswith("prune.")}
        for name, row in self.rows.items():
            prune = _pruning(name, row)
            swept = inner if row.get("grid", True) is not False else {}
            for point in itertools.product(*swept.values()):
                values.append(_with(prune, dict(zip(swept, point, strict=True))))
        files = [word for file in self.config for word in ("--config", file)]
        sets = [f"--{key}={json.dumps(value)}" for key, value in self.set.items()]
        return {
            "program": "pl-prune",
            "method": "grid",
            "metric": {"name": self.metric, "goal": self.direction},
            "command": ["${env}", "${program}", "fit", *files, *sets, "--config", "${args_json_file}"],
            "parameters": {
                "prune": {"values": values},
                **{key: {"values": v} for key, v in outer.items()},
                "seed_everything": {"values": list(self.seeds)},
            },
        }


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
        place = made
        *path, last = key.split(".")[1:]
        for part in path:
            inner = place.setdefault("init_args", {})
            if isinstance(inner.get(part), str):
                inner[part] = {"class_path": inner[part]}
            place = inner.setdefault(part, {})
        place.setdefault("init_args", {})[last] = value
    return made


def _key(row: str, point: Mapping[str, Any], seed: int) -> str:
    words = [row, *(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()), f"seed={seed}"]
    return "_".join(re.sub(r"[^A-Za-z0-9.=+-]+", "-", word) for word in words)


def _check_keys(content: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        raise PruneError(
            f"Expected the keys {', '.join(sorted(known))} in {where}; found {', '.join(map(repr, unknown))}. Look at the spelling."
        )


def _files(names: Any, study: Path, where: str) -> list[str]:
    names = [names] if isinstance(names, str) else list(names or [])
    found = []
    for name in names:
        places = [p for p in (Path(name), study.parent / name) if p.is_file()]
        if not places:
            raise PruneError(
                f"Expected the configuration file {name!r} of {where} in {str(study)!r}; found none, neither from the working folder nor "
                "beside the study. Look at the path."
            )
        found.append(str(places[0]))
    return found
