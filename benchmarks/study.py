"""What a study adds to a run: the same training by `pl-prune fit` in the same process, and by the runner.

* a run of a study over the same fit without one: limit 2 s more a run, the study's start included;
* the same with many finished runs in the database, which every run looks through.

    python benchmarks/study.py [--runs 8] [--finished 200] [--repeats 3] [--cpu-time]
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import timing

from pl_prune.cli import PruneCLI
from pl_prune.commands.study_run import StudyRun
from pl_prune.core.masks import MaskSet
from pl_prune.runs.folder import RunFolder
from pl_prune.runs.plan import Plan
from pl_prune.runs.spec import Spec, arguments
from pl_prune.runs.study import Study

ROOT = Path(__file__).parents[1]
SETTINGS = {"trainer.accelerator": "cpu", "trainer.max_epochs": 2, "model.network.width": 4, "prune.sparsity": 0.9}
QUIET = {"trainer.enable_progress_bar": False, "trainer.enable_model_summary": False}


def plan(seeds: Iterable[int]) -> Plan:
    files = ("recipes/settings/convnet_digits.yaml", "recipes/pai/snip.yaml")
    return Plan("bench", {"SNIP": {"config": []}}, seeds=tuple(seeds), config=files, set=SETTINGS)


def fit(specs: list[Spec], folder: Path) -> None:
    for spec in specs:
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": spec.key}}
        PruneCLI(args=["fit", *spec.words, *arguments({**QUIET, "trainer.logger": logger})])


def study(asked: Plan, folder: Path) -> None:
    Study(asked, folder).work(StudyRun.train, quiet)


def pretend(spec: Spec, run: RunFolder) -> None:
    """Finish a run without training it."""
    run.begin(0)
    run.log({"epoch": 1, "step": 1, "seconds": 1.0, "val/acc": 0.5})
    told = {"method": "SNIP", "sparsity": 0.9, "masks": None, "seconds": 1.0, "pruning_seconds": 0.0}
    run.finish({**told, "peak_bytes": None, "epochs": 1, "steps": 1, "metrics": {}}, MaskSet({}))


def quiet(_: str) -> None:
    pass


def took(work: Callable[..., None], *arguments: object) -> float:
    start = timing.now()
    work(*arguments)
    return timing.now() - start


def main() -> None:
    options = timing.parse(__doc__, 3, runs=8, finished=200)
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    os.chdir(ROOT)
    sys.argv = ["pl-prune"]
    with tempfile.TemporaryDirectory() as folder:
        times: dict[str, list[float]] = {"fit": [], "study": [], "study after many runs": []}
        old = range(10_000, 10_000 + options.finished)
        Study(plan(old), Path(folder, "many")).work(pretend, quiet)
        for n in range(options.repeats + 1):
            seeds = range(n * options.runs, (n + 1) * options.runs)
            taken = {
                "fit": took(fit, plan(seeds).specs(), Path(folder, "fit")),
                "study": took(study, plan(seeds), Path(folder, f"study{n}")),
                "study after many runs": took(study, plan([*old, *seeds]), Path(folder, "many")),
            }
            for name, seconds in taken.items() if n else ():  # the first round warms up
                times[name].append(seconds / options.runs)
    for name, label in (("study", "more a run"), ("study after many runs", f"more a run, {options.finished} finished")):
        more = [a - b for a, b in zip(times[name], times["fit"], strict=True)]
        note = f"{timing.seconds(median(times[name]))} - {timing.seconds(median(times['fit']))}; rounds {min(more):.3f} .. {max(more):.3f}"
        timing.line(label, timing.seconds(median(more)), "2 s", note)


if __name__ == "__main__":
    main()
