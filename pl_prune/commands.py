"""The commands of `pl-prune` that are not LightningCLI's."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pl_prune.core.types import PruneError


def study(argv: Sequence[str]) -> int:
    """Run the runs of a study that are not done, and print its table.

    Args:
        argv: Arguments after `study`.

    Returns:
        Exit status: 0; 1 if a run failed or is left.

    Raises:
        PruneError: If the study file or the database cannot be used.
    """
    parser = argparse.ArgumentParser(
        "pl-prune study", description="Run a grid of trainings, each once, and set them side by side."
    )
    parser.add_argument("--config", required=True, help="the study file")
    parser.add_argument("--folder", help="where runs, database and results go; default: studies/NAME")
    parser.add_argument("--storage", help="URL of a database, for several machines; default: a file in the folder")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (default 1)")
    parser.add_argument(
        "--as-sweep", action="store_true", help="print the same grid as a wandb sweep file, and run nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    from pl_prune.runs.plan import Plan

    plan = Plan.load(options.config)
    if options.as_sweep:
        import yaml

        sys.stdout.write(yaml.safe_dump(plan.sweep(), sort_keys=False))
        return 0
    if options.workers < 1:
        raise PruneError(f"Expected --workers of 1 or more; found {options.workers}. Leave it out for one.")

    from pl_prune.runs.study import Study

    folder = Path(options.folder or Path("studies") / plan.name)
    work = Study(plan, folder, options.storage)
    if options.workers == 1:
        _work(work)
    else:
        _start_workers(options.workers, argv)
    if options.worker:
        return 0
    failures = work.failures()
    if options.json:
        sys.stdout.write(
            json.dumps({"name": plan.name, "metric": plan.metric, "results": work.results(), "failures": failures})
            + "\n"
        )
    else:
        _show(work, failures)
    left = len(work.specs) - len(work.results())
    return 1 if left else 0


def report(argv: Sequence[str]) -> int:
    """Write the page of a study or of a run.

    Args:
        argv: Arguments after `report`.

    Returns:
        Exit status: 0.

    Raises:
        PruneError: If the folder holds neither.
    """
    parser = argparse.ArgumentParser(
        "pl-prune report", description="Write one HTML page, and its figures as PNG, about a study or a run."
    )
    parser.add_argument("folder", help="a study's folder, or a finished run's")
    parser.add_argument("--out", help="the page; default: report.html in the folder")
    parser.add_argument("--metric", help="default: the study's, else val/acc")
    parser.add_argument("--direction", choices=("maximize", "minimize"), help="default: the study's, else maximize")
    parser.add_argument("--json", action="store_true", help="print the path of the page as JSON")
    options = parser.parse_args(argv)

    from pl_prune.report.html import write_report

    about = Path(options.folder) / "study.json"
    told = json.loads(about.read_text()) if about.is_file() else {}
    metric = options.metric or told.get("metric", "val/acc")
    direction = options.direction or told.get("direction", "maximize")
    page = write_report(options.folder, options.out, metric=metric, direction=direction)
    sys.stdout.write((json.dumps({"page": str(page)}) if options.json else str(page)) + "\n")
    return 0


def doctor(argv: Sequence[str]) -> int:
    """Say what is installed, what is missing, and what will not work.

    Args:
        argv: Arguments after `doctor`.

    Returns:
        Exit status: 0, or 1 if something will not work.
    """
    parser = argparse.ArgumentParser(
        "pl-prune doctor", description="Versions, devices, extras, and what will not work together."
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    options = parser.parse_args(argv)

    from pl_prune.report.doctor import examine

    found = examine()
    sys.stdout.write((json.dumps(found.to_dict()) if options.json else found.text()) + "\n")
    return 1 if found.problems else 0


def _work(work: Any) -> None:
    from pl_prune.cli import StudyRun

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    work.work(StudyRun.train, _say)


def _start_workers(count: int, argv: Sequence[str]) -> None:
    """Start processes that share the machine's cores, and wait for them."""
    threads = max(1, (os.cpu_count() or 1) // count)
    env = {"OMP_NUM_THREADS": str(threads), **os.environ}
    command = [sys.executable, "-m", "pl_prune", "study", *argv, "--workers=1", "--worker"]
    processes = [subprocess.Popen(command, env=env) for _ in range(count)]
    for process in processes:
        process.wait()


def _say(line: str) -> None:
    sys.stderr.write(f"pl-prune study: {line}\n")
    sys.stderr.flush()


def _show(work: Any, failures: dict[str, str]) -> None:
    from pl_prune.report.study import study_table

    results = work.results()
    if results:
        sys.stdout.write(study_table(results, work.plan.metric, work.plan.direction) + "\n")
    for key, error in failures.items():
        sys.stdout.write(f"failed: {key}: {error}\n")
    left = len(work.specs) - len(results) - len(failures)
    if left:
        sys.stdout.write(f"{left} of {len(work.specs)} runs are left: run the same command again\n")
