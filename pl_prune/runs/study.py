"""`Study`: the runs of a plan, shared out over any number of processes and machines by a database, each done once."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from math import isfinite
from pathlib import Path
from typing import Any

from pl_prune.core.types import PruneError
from pl_prune.runs.asked import check_unchanged, note
from pl_prune.runs.database import heartbeats, open_database
from pl_prune.runs.folder import RunFolder, write_whole
from pl_prune.runs.lock import is_locked, locked
from pl_prune.runs.outcome import best_of_rows, cause_of, outcome, with_source
from pl_prune.runs.plan import Plan, Spec

_JUST_STARTED = timedelta(seconds=60)

Train = Callable[[Spec, RunFolder], None]
"""Trains one run to its end, from its last checkpoint where there is one."""


class Study:
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
        about = {"name": plan.name, "metric": plan.metric, "direction": plan.direction, "search": search}
        write_whole(self.folder / "study.json", json.dumps({**about, "references": plan.references()}, indent=1))

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

    def work(self, train: Train, say: Callable[[str], None]) -> None:
        """Take runs that are left, one after another, until the study is done.

        Runs that other processes hold are waited for, and taken over if their process dies.

        Args:
            train: Trains one run.
            say: Is told what happens, a line at a time.
        """
        worker = f"{socket.gethostname()}-{os.getpid()}"
        with locked(self.folder / "workers" / worker, wait=True):  # others may just be looking
            self._share_out()
            self._refuse_changed()
            say(f"{len(self.results())} of {self.total} runs are done")
            waiting = False
            while True:
                if self._take_one(train, say, worker):
                    continue
                if not self._trials("RUNNING"):
                    break
                if not waiting:
                    say("waiting for runs that other processes hold")
                waiting = True
                time.sleep(1)
            self._write_results()

    def _refuse_changed(self) -> None:
        """Raise if a run was begun with other settings than the plan has now: it would be shown as if it had them."""
        specs = self.specs
        for record in self.results():
            check_unchanged(specs[record["key"]], self.run_folder(specs[record["key"]]), record["asked"])
        for spec in specs.values():
            run = self.run_folder(spec)
            if run.checkpoint and not run.finished:
                check_unchanged(spec, run)

    def results(self) -> list[dict[str, Any]]:
        """List the finished runs, in the plan's order.

        Returns:
            Key, row, settings, seed, best and last value of the metric, times, memory, sparsity.
        """
        done = {
            t.user_attrs["key"]: t.user_attrs["result"] for t in self._trials("COMPLETE") if "result" in t.user_attrs
        }
        return [done[key] for key in self.specs if key in done]

    def left(self) -> list[Spec]:
        """List the runs that are not done; while a search is not done, a run of any point of its rows beside them.

        Returns:
            The runs.
        """
        done = [record["key"] for record in self.results()]
        left = [spec for key, spec in self.specs.items() if key not in done]
        if self.plan.search and len(done) < self.total:
            point = self.plan.search.any_point()
            rows = filter(self.plan.varies, self.plan.rows)
            left += [self.plan.spec(row, point, self.plan.seeds[0], 0) for row in rows]
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

    def _trials(self, *states: str) -> list[Any]:
        from optuna.trial import TrialState

        wanted = tuple(TrialState[state] for state in states) or None
        found: list[Any] = self._study.get_trials(deepcopy=False, states=wanted)
        return found

    def _share_out(self) -> None:
        """Put what is neither done nor in good hands into the queue; once nothing is left, the next point of a search."""
        from optuna.trial import TrialState

        with locked(self.folder / "sharing", wait=True):
            for trial in self._trials("RUNNING"):
                if self._orphaned(trial):
                    self._study.tell(trial.number, state=TrialState.FAIL)
            done = {t.user_attrs.get("key") for t in self._trials("COMPLETE")}
            busy = {t.user_attrs.get("key") for t in self._trials("RUNNING", "WAITING")}
            failed = {
                t.user_attrs["key"]
                for t in self._trials("FAIL")
                if "error" in t.user_attrs and t.datetime_complete > self._begun
            }
            left = [spec for key, spec in self.specs.items() if key not in done | busy | failed]
            ready = [spec for spec in left if spec.weights_of is None or spec.weights_of in done]
            for spec in ready or self._proposal():
                point = {} if spec.trial is None else {"row": spec.row, "trial": spec.trial, "point": spec.settings}
                self._study.enqueue_trial({}, user_attrs={"key": spec.key, **point})

    def _proposal(self) -> list[Spec]:
        """Return the next point of the row that has the fewest, where there is a search and nobody has a run to wait for."""
        search = self.plan.search
        if search is None or self._trials("WAITING"):
            return []
        reached = {record["key"]: record["last"] for record in self.results() if isfinite(record["last"])}
        earlier: dict[str, list[tuple[dict[str, Any], float | None]]]
        earlier = {row: [] for row in self.plan.rows if self.plan.varies(row)}
        for spec in self.specs.values():
            if spec.row in earlier:
                earlier[spec.row].append((spec.settings, reached.get(spec.key)))
        row = min(earlier, key=lambda name: len(earlier[name]), default=None)
        if row is None or len(earlier[row]) >= search.points:
            return []
        point = search.propose(row, earlier[row], self.plan.direction)
        return [self.plan.spec(row, point, self.plan.seeds[0], len(earlier[row]))]

    def _orphaned(self, trial: Any) -> bool:
        """Say whether a running trial's worker was on this machine and is gone."""
        worker = trial.user_attrs.get("worker")
        if worker is None:  # its process had no time to say who it is
            me = f"{socket.gethostname()}-{os.getpid()}"
            others = [p for p in (self.folder / "workers").glob("*") if p.name != me and is_locked(p)]
            old = trial.datetime_start is None or datetime.now() - trial.datetime_start > _JUST_STARTED
            return old or (self._local and not others)
        here = worker.rpartition("-")[0] == socket.gethostname()
        return here and not is_locked(self.folder / "workers" / worker)

    def _take_one(self, train: Train, say: Callable[[str], None], worker: str) -> bool:
        """Do one run of the queue; say whether there was one."""
        import optuna

        done: list[bool] = []
        taking = ExitStack()  # on SQLite, two processes that ask at once may be given the same run

        def objective(trial: Any) -> float:
            named = "key" in trial.user_attrs  # else the queue is empty, and Optuna has made this one up
            done.append(named)
            if named:
                trial.set_user_attr("worker", worker)
            taking.close()
            spec = self.specs.get(trial.user_attrs["key"]) if named else None
            if spec is None or self._has_twin(trial):
                raise optuna.TrialPruned  # also of a row that the study file no longer has, or put into the queue twice
            result = self._result(spec, train, say, trial)
            trial.set_user_attr("result", result)
            return float(result["last"]) if isfinite(result["last"]) else 0.0  # Optuna takes a NaN for a failure

        if not self._trials("WAITING"):
            with heartbeats():
                optuna.storages.fail_stale_trials(self._study)  # silent ones on other machines
            self._share_out()
            if not self._trials("WAITING"):
                return False
        with heartbeats(), taking:
            taking.enter_context(locked(self.folder / "sharing", wait=True))
            try:
                self._study.optimize(objective, n_trials=1, catch=(Exception,))
            except ValueError as error:  # not the run's own: another machine has given this one up for silent
                say(f"{self.plan.name}: {error} Its run is read from its folder")
        return any(done)

    def _has_twin(self, trial: Any) -> bool:
        """Say whether the same run is done, or was begun before: machines that start together fill the queue together."""
        twins = [
            t
            for t in self._trials("RUNNING", "COMPLETE")
            if t.user_attrs.get("key") == trial.user_attrs["key"] and t.number != trial.number
        ]
        return any(t.state.name == "COMPLETE" or t.number < trial.number for t in twins)

    def _result(self, spec: Spec, train: Train, say: Callable[[str], None], trial: Any) -> dict[str, Any]:
        run = self.run_folder(spec)
        try:
            if run.finished or run.checkpoint:
                check_unchanged(spec, run)
            if not run.finished:
                say(f"{spec.key}: {'resumed' if run.checkpoint else 'started'}")
                note(spec, run)
                train(with_source(spec, self.folder), run)
            result = outcome(spec, run, self.plan.metric, self.plan.direction)
        except Exception as error:
            cause = cause_of(error)
            trial.set_user_attr("error", f"{type(cause).__name__}: {cause}")
            say(f"{spec.key}: FAILED, {type(cause).__name__}: {cause}")
            raise
        say(f"{spec.key}: {self.plan.metric} {result['last']:.4f} in {result['seconds']:.1f} s")
        return result

    def _write_results(self) -> None:
        write_whole(self.folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in self.results()))
