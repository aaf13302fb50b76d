"""`Plan`: the runs of a study, from its file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pl_prune.core.types import PruneError
from pl_prune.runs.search import Search
from pl_prune.runs.spec import Spec, key_of
from pl_prune.runs.study_file import check_keys, files, mapping, read

_KEYS = {"name", "metric", "direction", "config", "set", "rows", "grid", "search", "seeds", "not_reproduced", "paper"}
_ROW_KEYS = {"config", "set", "grid", "weights_of", "masks_of"}


@dataclass(frozen=True)
class Plan:
    """What a study file asks for: every row at every point of the grid, or at the points of a search, with every seed.

    Args:
        name: Names the study and its folder.
        rows: Row name -> configuration files, settings, whether the grid or the search applies to it, and the row
            whose weights, or weights and masks, it starts from.
        grid: Dotted key -> values.
        seeds: Seeds of every point.
        metric: The logged metric that decides.
        direction: Whether it is to be "maximize"d or "minimize"d.
        config: Configuration files of all rows.
        set: Settings of all rows, by dotted key.
        search: Takes the place of the grid; None: there is a grid.
        not_reproduced: Rows of a paper's table whose methods cannot be run here.
        paper: Row name -> what a paper reports, as it prints it, at each point of the grid in order; None where nothing.
    """

    name: str
    rows: dict[str, dict[str, Any]]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    metric: str = "val/acc"
    direction: Literal["maximize", "minimize"] = "maximize"
    config: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)
    search: Search | None = None
    not_reproduced: tuple[str, ...] = ()
    paper: dict[str, list[str | None]] = field(default_factory=dict)

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
        content = read(file, _KEYS)
        rows = mapping(content.get("rows"), f"rows of {str(file)!r}, name: {{config, set}}")
        if not rows:
            raise PruneError(f"Expected rows, name: {{config, set}}, in {str(file)!r}; found none. Write at least one.")
        rows = {str(name): _row(str(name), row, file) for name, row in rows.items()}
        grid = mapping(content.get("grid"), "grid, dotted key: values")
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                fix = "Write one, or leave the key out." if values == [] else "Put them in brackets."
                raise PruneError(f"Expected a list of values for grid.{key}; found {values!r}. {fix}")
        seeds = content.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
            raise PruneError(f"Expected seeds to be a list of whole numbers; found {seeds!r}. Write seeds: [0, 1, 2].")
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise PruneError(f"Expected different seeds; found {twice[0]} twice. Leave one out.")
        direction = content.get("direction", "maximize")
        if direction not in ("maximize", "minimize"):
            raise PruneError(f"Expected direction to be 'maximize' or 'minimize'; found {direction!r}. Choose one.")
        metric = content.get("metric", "val/acc")
        if not isinstance(metric, str):
            raise PruneError(f"Expected metric to be a name; found {metric!r}. Write val/acc, say.")
        search = Search.read(content["search"], str(file)) if "search" in content else None
        if search and (grid or len(seeds) > 1):
            raise PruneError(
                f"Expected a search with one seed and without a grid; found {'grid' if grid else f'seeds {seeds}'} beside it. "
                "Search first, then compare the best points over seeds in a study of their own."
            )
        missing = content.get("not_reproduced") or []
        if not isinstance(missing, list) or not all(isinstance(name, str) and name not in rows for name in missing):
            raise PruneError(
                f"Expected not_reproduced to be a list of names that are no rows; found {missing!r}. Write [name, name]."
            )
        plan = cls(
            name=str(content.get("name", file.stem)),
            rows=rows,
            grid=grid,
            seeds=tuple(seeds),
            metric=metric,
            direction=direction,
            config=tuple(files(content.get("config"), file, "config")),
            set=mapping(content.get("set"), "set, dotted key: value"),
            search=search,
            not_reproduced=tuple(missing),
            paper=mapping(content.get("paper"), "paper, row: values"),
        )
        plan._check()
        return plan

    def _check(self) -> None:
        if self.search and not any(map(self.varies, self.rows)):
            raise PruneError(
                "Expected a row that is searched; found rows with grid: false alone. Leave that out of one."
            )
        for name, row in self.rows.items():
            if {"weights_of", "masks_of"} <= set(row):
                raise PruneError(
                    f"Expected weights_of or masks_of in row {name!r}; found both. Leave weights_of out: masks come with their weights."
                )
            chain = [name]
            while (source := self.source(chain[-1])) in self.rows and source not in chain:
                chain.append(source)
            if source in chain:
                raise PruneError(
                    f"Expected weights_of and masks_of to lead to a row that starts from scratch; found {' from '.join([*chain, source])}. "
                    "Let one of them start from another row."
                )
            if source is not None:
                close = get_close_matches(source, self.rows, 1)
                raise PruneError(
                    f"Expected a row in weights_of or masks_of of {chain[-1]!r}; found {source!r}. "
                    f"{f'The closest name is {close[0]!r}' if close else 'The rows are ' + ', '.join(self.rows)}."
                )
            if len(chain) > 1 and self.varies(chain[1]) and (self.search or not self.varies(name)):
                raise PruneError(
                    f"Expected the row of weights_of or masks_of to have one run, or one at each point of the grid as the row that starts "
                    f"from it; found {chain[1]!r} in row {name!r}. Give {chain[1]!r} grid: false."
                )
        for name, values in self.paper.items():
            if name not in self.rows and name not in self.not_reproduced:
                raise PruneError(
                    f"Expected a row or a name of not_reproduced in `paper`; found {name!r}. Look at the spelling."
                )
            count = len(self.points(name))
            kinds = isinstance(values, list) and all(v is None or isinstance(v, str | int | float) for v in values)
            if not kinds or len(values) != count:
                raise PruneError(
                    f"Expected the paper's values of {name!r} as a list of {count}, one for each point of the grid; found {values!r}. "
                    "Write null where it reports nothing."
                )

    def varies(self, row: str) -> bool:
        """Say whether the grid or the search applies to a row.

        Args:
            row: Its name.

        Returns:
            False for a row with `grid: false`.
        """
        return self.rows.get(row, {}).get("grid", True) is not False

    def source(self, row: str) -> str | None:
        """Name the row that another starts from.

        Args:
            row: The other.

        Returns:
            The row of the same seed, and of the same point where that varies; None where the other starts from scratch.
        """
        told = self.rows[row]
        return told.get("weights_of") or told.get("masks_of")

    def points(self, row: str) -> list[dict[str, Any]]:
        """List the points of the grid that a row takes.

        Args:
            row: Its name.

        Returns:
            Settings by dotted key; a single empty one for a row outside the grid, or without one.
        """
        if not self.varies(row):
            return [{}]
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def spec(self, row: str, point: dict[str, Any], seed: int, trial: int | None = None) -> Spec:
        """Return one run.

        Args:
            row: Its row.
            point: Its point.
            seed: Its seed.
            trial: Its number in the row's search; None in a grid.

        Returns:
            The run.
        """
        told = self.rows[row]
        source, masks = self.source(row), "masks_of" in told
        own = {key: value for key, value in point.items() if not (masks and key.startswith("prune."))}
        return Spec(
            key=key_of(row, point if trial is None else {"trial": trial}, seed),
            row=row,
            settings=point,
            seed=seed,
            config=(*self.config, *told["config"]),
            values={**self.set, **(told.get("set") or {}), **own, "seed_everything": seed},
            weights_of=None if source is None else key_of(source, point if self.varies(source) else {}, seed),
            masks=masks,
            trial=trial,
        )

    def specs(self) -> list[Spec]:
        """List the runs that are known beforehand, seed after seed, so that a study that is cut short has all rows.

        Returns:
            One for each row, point and seed; the rows of a search have none yet.

        Raises:
            PruneError: If two have the same name.
        """
        specs = [
            self.spec(row, point, seed)
            for seed in self.seeds
            for row in self.rows
            if self.search is None or not self.varies(row)
            for point in self.points(row)
        ]
        searched = filter(self.varies, self.rows) if self.search else ()
        keys = [spec.key for spec in specs] + [key_of(row, {"trial": 0}, self.seeds[0]) for row in searched]
        if len(set(keys)) < len(keys):
            raise PruneError(
                f"Expected every run of the study to have a name of its own; found {max(keys, key=keys.count)!r} more than once. "
                "Rename a row, or leave out equal values and seeds."
            )
        return specs

    def references(self) -> list[dict[str, Any]]:
        """List what a paper reports, and its rows that cannot be run here.

        Returns:
            Records of row, settings, value (None where the paper's is not given) and whether the row is reproduced.
        """
        found = []
        for row in (*self.rows, *self.not_reproduced):
            points = self.points(row) if row in self.paper else [] if row in self.rows else [{}]
            values = self.paper.get(row, [None] * len(points))
            for point, value in zip(points, values, strict=True):
                if value is not None or row in self.not_reproduced:
                    text = None if value is None else str(value)
                    found.append({"row": row, "settings": point, "value": text, "reproduced": row in self.rows})
        return found


def _row(name: str, content: Any, study: Path) -> dict[str, Any]:
    row = mapping(content, f"row {name!r} to be {{config, set}}")
    check_keys(row, _ROW_KEYS, f"row {name!r}")
    if not isinstance(row.get("grid", True), bool):
        raise PruneError(
            f"Expected grid of row {name!r} to be true or false; found {row['grid']!r}. The grid's values stand in `grid` of the study."
        )
    for key in {"weights_of", "masks_of"} & set(row):
        if not isinstance(row[key], str):
            raise PruneError(f"Expected {key} of row {name!r} to be the name of a row; found {row[key]!r}. Name one.")
    return {
        **row,
        "config": files(row.get("config"), study, f"row {name!r}"),
        "set": mapping(row.get("set"), f"set of row {name!r}, dotted key: value"),
    }
