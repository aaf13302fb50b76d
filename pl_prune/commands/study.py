"""`pl-prune study`: a grid or a search of trainings, each run once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_prune.core.types import PruneError

if TYPE_CHECKING:
    from pl_prune.report.table import Part
    from pl_prune.runs.folder import RunFolder
    from pl_prune.runs.spec import Spec
    from pl_prune.runs.study import Study


def run(argv: Sequence[str]) -> int:
    """Run the runs of a study that are not done, and print its table.

    Args:
        argv: Arguments after `study`.

    Returns:
        Exit status: 0; 1 if a run failed or is left; 2 if a worker could not use the study.

    Raises:
        PruneError: If the study file or the database cannot be used.
    """
    parser = argparse.ArgumentParser(
        "pl-prune study", description="Run a grid or a search of trainings, each once, and set them side by side."
    )
    parser.add_argument("--config", required=True, help="the study file")
    parser.add_argument("--folder", help="where runs, database and results go; default: studies/NAME")
    parser.add_argument("--storage", help="URL of a database, for several machines; default: a file in the folder")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (default 1)")
    parser.add_argument(
        "--as-sweep", action="store_true", help="print the same grid or search as a wandb sweep file, and run nothing"
    )
    parser.add_argument("--json", action="store_true", help="print table, results and failures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    from pl_prune.report.terminal import show, show_json
    from pl_prune.runs.plan import Plan

    plan = Plan.load(options.config)
    if options.as_sweep:
        _print_sweep(plan, options.json)
        return 0

    from pl_prune.runs.study import Study

    work = Study(plan, Path(options.folder or Path("studies") / plan.name), options.storage)
    if not train(work, options.workers, ["study", *argv]):
        return 2
    if options.worker:
        return 0
    if options.json:
        show_json(_content(work), sys.stdout)
    else:
        show(_parts(work), sys.stdout)
    return 1 if len(work.results()) < work.total else 0


def _print_sweep(plan: Any, as_json: bool) -> None:
    import yaml

    from pl_prune.report.terminal import show_json
    from pl_prune.runs.sweep import as_sweep

    if as_json:
        show_json(as_sweep(plan), sys.stdout)
    else:
        sys.stdout.write(yaml.safe_dump(as_sweep(plan), sort_keys=False))


def train(work: Study, workers: int, command: Sequence[str]) -> bool:
    """Train the runs that are left, in this process or in several.

    Args:
        work: The study.
        workers: How many processes.
        command: What this process was started with, its command first; a worker gets the same and `--worker`.

    Returns:
        False if a worker could not use the study.

    Raises:
        PruneError: If there are no workers, or settings of runs that are left are not what `pl-prune fit` takes.
    """
    if workers < 1:
        raise PruneError(f"Expected --workers of 1 or more; found {workers}. Leave it out for one.")
    from pl_prune.commands.progress import Progress

    if left := work.left():
        from pl_prune.commands.study_run import StudyRun

        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if "--worker" not in command:
            StudyRun.check(left)
    parent = os.getppid()
    with Progress(work, sys.stderr) as progress:
        if left and workers > 1:
            return 2 not in progress.follow(workers, [*command, "--workers=1", "--worker"])
        work.work(_train, progress.say, lambda: "--worker" not in command or os.getppid() == parent)
    return True


def _train(spec: Spec, run: RunFolder) -> None:
    from pl_prune.commands.study_run import StudyRun

    StudyRun.train(spec, run)


def _content(work: Study) -> dict[str, Any]:
    from pl_prune.report.study import summary

    plan, results, failures = work.plan, work.results(), work.failures()
    return {
        "name": plan.name,
        "metric": plan.metric,
        "direction": plan.direction,
        "table": summary(results, plan.direction),
        "references": plan.references(),
        "best": work.best(),
        "results": results,
        "failures": failures,
        "left": max(0, work.total - len(results) - len(failures)),
    }


def _parts(work: Study) -> list[Part]:
    from pl_prune.report.study import standings

    plan, results = work.plan, work.results()
    parts: list[Part] = []
    if results:
        parts.append(standings(results, plan.metric, plan.direction, plan.references()))
    for record in work.best():
        settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
        parts.append(f"best of {record['row']}: {plan.metric} {record['last']:.4f} with {settings}")
    return parts + unfinished(work)


def unfinished(work: Study) -> list[Part]:
    """Say which runs failed, and how many are left.

    Args:
        work: The study.

    Returns:
        Lines; none where all is done.
    """
    from pl_prune.report.table import Alarm

    failures = work.failures()
    parts: list[Part] = [Alarm(f"failed: {key}: {error}") for key, error in failures.items()]
    left = max(0, work.total - len(work.results()) - len(failures))
    waiting = [spec.key for spec in work.specs.values() if spec.weights_of in failures]
    if waiting:
        parts.append(f"{', '.join(waiting)} could not start: what a row starts from failed")
    elif left:
        parts.append(f"{left} of {work.total} runs are left: run the same command again")
    return parts
