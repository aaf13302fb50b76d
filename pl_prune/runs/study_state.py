"""`StudyState`: what a study's plan asks for, and what its database and its runs say of it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from pl_prune.core.metrics import MetricMissing
from pl_prune.core.types import PruneError
from pl_prune.runs.database import open_database
from pl_prune.runs.folder import RunFolder, write_whole
from pl_prune.runs.outcome import best_of_rows, by_metric
from pl_prune.runs.plan import Plan
from pl_prune.runs.spec import Spec


class StudyState:
    """The state of a study: what is done, what is being done, what is left.

    Args:
        plan: What is to be run.
        folder: Where runs, database and results go.
        storage: URL of the database; None: the file study.db in the folder.

    Raises:
        PruneError: If Optuna is missing, the database cannot be reached, or it holds the points of another search.
    """

    def __init__(self, plan: Plan, folder: str | Path, storage: str | None = None) -> None:
        self.plan = plan
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "study.json"
        other = json.loads(file.read_text()).get("name", plan.name) if file.is_file() else plan.name
        if other != plan.name:
            raise PruneError(
                f"Expected the folder of {plan.name!r} in {str(self.folder)!r}; found that of {other!r}. Choose another --folder."
            )
        self._planned = {spec.key: spec for spec in plan.specs()}
        self._begun = datetime.now()  # what failed before is tried again
        self._local = storage is None
        self._study = open_database(plan.name, plan.direction, self.folder, storage)
        search = plan.search.told() if plan.search else None
        told = self._study.user_attrs.get("search", search)
        if told != search:
            raise PruneError(
                f"Expected the search that the points of {plan.name!r} were proposed by, {told}; found {search}. "
                "Give the changed study another name or --folder, or put the search back; its number of trials may change."
            )
        self._study.set_user_attr("search", search)
        self._fatal: MetricMissing | None = None
        self._write_about()

    @property
    def total(self) -> int:
        """How many runs the plan asks for."""
        searched = sum(map(self.plan.varies, self.plan.rows)) if self.plan.search else 0
        return len(self._planned) + searched * (self.plan.search.points if self.plan.search else 0)

    @property
    def specs(self) -> dict[str, Spec]:
        """The runs by key, in the plan's order; those of a search as far as they are proposed."""
        if self.plan.search is None:
            return self._planned
        proposed: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in self.plan.rows}
        for trial in self._trials():
            told = trial.user_attrs
            if "point" in told and told["row"] in proposed:
                proposed[told["row"]].setdefault(told["trial"], told["point"])
        seed, found = self.plan.seeds[0], list(self._planned.values())
        for row, points in proposed.items():
            found += [self.plan.spec(row, points[n], seed, n) for n in sorted(points)]
        order = list(self.plan.rows)
        return {spec.key: spec for spec in sorted(found, key=lambda spec: order.index(spec.row))}

    def run_folder(self, spec: Spec) -> RunFolder:
        """Return the folder of a run.

        Args:
            spec: The run.

        Returns:
            `runs/<key>` in the study's folder.
        """
        return RunFolder(self.folder / "runs" / spec.key)

    def results(self) -> list[dict[str, Any]]:
        """List the finished runs, in the plan's order.

        Returns:
            Key, row, settings, seed, best and last value of the metric, times, memory, sparsity.
        """
        done = {
            t.user_attrs["key"]: t.user_attrs["result"] for t in self._trials("COMPLETE") if "result" in t.user_attrs
        }
        metric, direction = self.plan.metric, self.plan.direction
        return [
            by_metric(done[key], self.run_folder(spec), metric, direction)
            for key, spec in self.specs.items()
            if key in done
        ]

    def left(self) -> list[Spec]:
        """List the runs that are not done; while a search is not done, a run of any point of its rows beside them.

        Returns:
            The runs.
        """
        done = [record["key"] for record in self.results()]
        left = [spec for key, spec in self.specs.items() if key not in done]
        if self.plan.search and len(done) < self.total:
            rows = filter(self.plan.varies, self.plan.rows)
            ends = self.plan.search.ends()
            left += [self.plan.spec(row, point, self.plan.seeds[0], 0) for row in rows for point in ends]
        return left

    def best(self) -> list[dict[str, Any]]:
        """Name the best finished run of each row that is searched, by the last value of the metric.

        Returns:
            Records as in `results`.
        """
        searched = [r for r in self.results() if self.plan.search and self.plan.varies(r["row"])]
        return best_of_rows(searched, self.plan.direction)

    def failures(self) -> dict[str, str]:
        """List the runs whose last try failed.

        Returns:
            What went wrong, by key.
        """
        done, specs = {r["key"] for r in self.results()}, self.specs
        failed = {t.user_attrs["key"]: t.user_attrs["error"] for t in self._trials("FAIL") if "error" in t.user_attrs}
        return {key: error for key, error in failed.items() if key in specs and key not in done}

    def running(self) -> list[str]:
        """List the runs that some process is at work on.

        Returns:
            Their keys.
        """
        return sorted({t.user_attrs["key"] for t in self._trials("RUNNING") if "key" in t.user_attrs})

    def write(self) -> None:
        """Write what is done, as results.jsonl, and how much is left, into study.json."""
        write_whole(self.folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in self.results()))
        self._write_about()

    def _write_about(self) -> None:
        plan = self.plan
        search = plan.search.told() if plan.search else None
        about = {"name": plan.name, "metric": plan.metric, "direction": plan.direction, "search": search}
        counts = {"references": plan.references(), "total": self.total, "failures": self.failures()}
        write_whole(self.folder / "study.json", json.dumps({**about, **counts}, indent=1))

    def _trials(self, *states: str) -> list[Any]:
        from optuna.trial import TrialState

        wanted = tuple(TrialState[state] for state in states) or None
        found: list[Any] = self._study.get_trials(deepcopy=False, states=wanted)
        return found
