"""`Study`: the runs of a plan, shared out over any number of processes and machines by a database, each done once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from math import isfinite
from typing import Any

from pl_prune.core.metrics import MetricMissing
from pl_prune.runs.asked import check_unchanged, note
from pl_prune.runs.database import heartbeats
from pl_prune.runs.folder import RunFolder
from pl_prune.runs.lock import is_locked, locked
from pl_prune.runs.outcome import cause_of, outcome, with_source
from pl_prune.runs.spec import Spec
from pl_prune.runs.study_state import StudyState

_JUST_STARTED = timedelta(seconds=60)

Train = Callable[[Spec, RunFolder], None]
"""Trains one run to its end, from its last checkpoint where there is one."""


class Study(StudyState):
    """A study that is worked on. Takes the arguments of `StudyState`."""

    def work(self, train: Train, say: Callable[[str], None], go_on: Callable[[], bool] = lambda: True) -> None:
        """Take runs that are left, one after another, until the study is done.

        Runs that other processes hold are waited for, and taken over if their process dies.

        Args:
            train: Trains one run.
            say: Is told what happens, a line at a time.
            go_on: Whether to take another run.

        Raises:
            PruneError: If settings changed under a run, or no run logs the metric that decides.
        """
        worker = f"{socket.gethostname()}-{os.getpid()}"
        with locked(self.folder / "workers" / worker, wait=True):  # others may just be looking
            self._share_out()
            self._refuse_changed()
            say(f"{len(self.results())} of {self.total} runs are done")
            waiting = False
            while go_on():
                if self._take_one(train, say, worker):
                    self.write()
                    if self._fatal:
                        raise self._fatal
                    continue
                if not self._trials("RUNNING"):
                    break
                if not waiting:
                    say("waiting for runs that other processes hold")
                waiting = True
                time.sleep(1)
            self.write()

    def _refuse_changed(self) -> None:
        """Raise if a run was begun with other settings than the plan has now: it would be shown as if it had them."""
        specs = self.specs
        for record in self.results():
            check_unchanged(specs[record["key"]], self.run_folder(specs[record["key"]]), record["asked"])
        for spec in specs.values():
            run = self.run_folder(spec)
            if run.checkpoint and not run.finished:
                check_unchanged(spec, run)

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
        proposed = search.next_point(earlier, self.plan.direction)
        return [] if proposed is None else [self.plan.spec(*proposed[:2], self.plan.seeds[0], proposed[2])]

    def _orphaned(self, trial: Any) -> bool:
        """Say whether a running trial's worker was on this machine and is gone."""
        worker = trial.user_attrs.get("worker")
        if worker is None:  # its process had no time to say who it is
            me = f"{socket.gethostname()}-{os.getpid()}"
            others = [p for p in (self.folder / "workers").glob("*") if p.name != me and is_locked(p)]
            old = trial.datetime_start is None or datetime.now() - trial.datetime_start > _JUST_STARTED
            return old or (self._local and not others)
        here, lock = worker.rpartition("-")[0] == socket.gethostname(), self.folder / "workers" / worker
        return here and lock.is_file() and not is_locked(lock)  # without a file it has a folder of its own

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
            self._fatal = cause if isinstance(cause, MetricMissing) else None
            trial.set_user_attr("error", f"{type(cause).__name__}: {cause}")
            say(f"{spec.key}: FAILED, {type(cause).__name__}: {cause}")
            raise
        say(f"{spec.key}: {self.plan.metric} {result['last']:.4f} in {result['seconds']:.1f} s")
        return result
