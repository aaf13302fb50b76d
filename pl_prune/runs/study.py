"""`Study`: the runs of a plan, shared out over any number of processes and machines by a database, each done once."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pl_prune.core.types import PruneError
from pl_prune.runs.folder import RunFolder, write_whole
from pl_prune.runs.lock import is_locked, locked
from pl_prune.runs.plan import Plan, Spec

HEARTBEAT = 60  # seconds; a run elsewhere whose process is silent for twice as long is given to another
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
        PruneError: If Optuna is missing, or the database cannot be reached.
    """

    def __init__(self, plan: Plan, folder: str | Path, storage: str | None = None) -> None:
        try:
            import optuna
        except ImportError as error:
            raise PruneError(
                "Expected Optuna, which studies stand on; found it missing. Run `pip install 'pl_prune[study]'`."
            ) from error
        self.plan = plan
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {"name": plan.name, "metric": plan.metric, "direction": plan.direction}
        write_whole(self.folder / "study.json", json.dumps(told, indent=1))
        self.specs = {spec.key: spec for spec in plan.specs()}
        self._optuna = optuna
        self._begun = datetime.now()  # what failed before is tried again
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._local = storage is None
        url = storage or f"sqlite:///{self.folder.resolve() / 'study.db'}"
        try:
            with _heartbeats(), locked(self.folder / "sharing", wait=True):
                database = optuna.storages.RDBStorage(
                    url,
                    heartbeat_interval=HEARTBEAT,
                    engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
                )
            self._study = optuna.create_study(
                storage=database,
                study_name=plan.name,
                direction=plan.direction,
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),
            )
        except Exception as error:
            raise PruneError(
                f"Expected a database at {url!r}; found that it cannot be reached ({type(error).__name__}: {error}). "
                "Look at --storage; leave it out for a file."
            ) from error

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
            say(f"{len(self.results())} of {len(self.specs)} runs are done")
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
        """Raise if a finished run was made with other settings than the plan has now: it would be shown as if it had them."""
        for record in self.results():
            spec = self.specs[record["key"]]
            now = {"config": [Path(file).name for file in spec.config], "values": spec.values}
            if record["asked"] != now:
                raise PruneError(
                    f"Expected the settings that {spec.key!r} was run with, {record['asked']}; found {now}. "
                    "Give the changed study another name or --folder, or put the settings back."
                )

    def results(self) -> list[dict[str, Any]]:
        """List the finished runs, in the plan's order.

        Returns:
            Key, row, settings, seed, best and last value of the metric, times, memory, sparsity.
        """
        done = {
            t.user_attrs["key"]: t.user_attrs["result"] for t in self._trials("COMPLETE") if "result" in t.user_attrs
        }
        return [done[key] for key in self.specs if key in done]

    def failures(self) -> dict[str, str]:
        """List the runs whose last try failed.

        Returns:
            What went wrong, by key.
        """
        done = {r["key"] for r in self.results()}
        failed = {t.user_attrs["key"]: t.user_attrs["error"] for t in self._trials("FAIL") if "error" in t.user_attrs}
        return {key: error for key, error in failed.items() if key in self.specs and key not in done}

    def _trials(self, *states: str) -> list[Any]:
        wanted = tuple(self._optuna.trial.TrialState[state] for state in states)
        return self._study.get_trials(deepcopy=False, states=wanted)

    def _share_out(self) -> None:
        """Put what is neither done nor in good hands into the queue."""
        with locked(self.folder / "sharing", wait=True):
            for trial in self._trials("RUNNING"):
                if self._orphaned(trial):
                    self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            busy = {t.user_attrs.get("key") for t in self._trials("RUNNING", "WAITING", "COMPLETE")}
            failed = {
                t.user_attrs["key"]
                for t in self._trials("FAIL")
                if "error" in t.user_attrs and t.datetime_complete > self._begun
            }
            for key in self.specs:
                if key not in busy | failed:
                    self._study.enqueue_trial({}, user_attrs={"key": key})

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
        optuna = self._optuna
        done: list[bool] = []

        def objective(trial: Any) -> float:
            if "key" not in trial.user_attrs:  # the queue is empty, and Optuna has made this one up
                done.append(False)
                raise optuna.TrialPruned
            done.append(True)
            trial.set_user_attr("worker", worker)
            spec = self.specs.get(trial.user_attrs["key"])
            if spec is None:
                raise optuna.TrialPruned  # of a row that the study file no longer has
            result = self._result(spec, train, say, trial)
            trial.set_user_attr("result", result)
            return float(result["best"])

        if not self._trials("WAITING"):
            with _heartbeats():
                optuna.storages.fail_stale_trials(self._study)  # silent ones on other machines
            self._share_out()
            if not self._trials("WAITING"):
                return False
        with _heartbeats():
            self._study.optimize(objective, n_trials=1, catch=(Exception,))
        return any(done)

    def _result(self, spec: Spec, train: Train, say: Callable[[str], None], trial: Any) -> dict[str, Any]:
        run = self.run_folder(spec)
        try:
            if not run.finished:
                say(f"{spec.key}: {'resumed' if run.checkpoint else 'started'}")
                train(spec, run)
            result = self._record(spec, run)
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            say(f"{spec.key}: FAILED, {type(error).__name__}: {error}")
            raise
        say(f"{spec.key}: {self.plan.metric} {result['last']:.4f} in {result['seconds']:.1f} s")
        return result

    def _record(self, spec: Spec, run: RunFolder) -> dict[str, Any]:
        result = run.result()
        values = [record[self.plan.metric] for record in run.metrics() if self.plan.metric in record]
        if not values:
            known = sorted(result["metrics"])
            raise PruneError(
                f"Expected the metric {self.plan.metric!r} in {str(run.path)!r}; found {', '.join(known) or 'none'}. "
                "Set `metric` in the study file to one that the module logs each epoch."
            )
        best = max(values) if self.plan.direction == "maximize" else min(values)
        kept = ("method", "sparsity", "masks", "seconds", "pruning_seconds", "peak_bytes", "epochs", "steps")
        return {
            "key": spec.key,
            "row": spec.row,
            "settings": spec.settings,
            "seed": spec.seed,
            "asked": {"config": [Path(file).name for file in spec.config], "values": spec.values},
            "best": best,
            "last": values[-1],
            **{name: result[name] for name in kept},
            "folder": str(run.path),
        }

    def _write_results(self) -> None:
        write_whole(self.folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in self.results()))


@contextmanager
def _heartbeats() -> Iterator[None]:
    """Use Optuna's heartbeats without its word that they may change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*experimental")
        yield
