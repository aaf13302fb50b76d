"""`pl-prune adversarial`: robust pretraining, mask search and fine-tuning, one after another."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pl_prune.report.table import Table
    from pl_prune.runs.spec import Spec
    from pl_prune.runs.stages import Stages

_TOLD = ("method", "sparsity", "masks", "seed", "epochs", "steps", "seconds", "metrics")
_MEASURED = ("total", "clean", "clean_interval", "robust", "robust_interval")


def run(argv: Sequence[str]) -> int:
    """Do the stages that are not done, measure robustness after the last two, and print the table.

    Args:
        argv: Arguments after `adversarial`.

    Returns:
        Exit status: 0.
    """
    options, words = _parser().parse_known_args(argv)

    from pl_prune.callbacks.robustness import RobustnessEvaluation
    from pl_prune.commands.study_run import StudyRun
    from pl_prune.report.terminal import finite, show, show_json
    from pl_prune.runs.folder import RunFolder, write_whole
    from pl_prune.runs.lock import locked
    from pl_prune.runs.stages import Stages, settings

    stages = Stages.load(options.config, options.weights, options.seed, settings(words))
    folder = Path(options.folder or Path("adversarial") / stages.name)
    RobustnessEvaluation(**stages.evaluate)  # before any work, since it refuses bad settings
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    content: dict[str, Any] = {"name": stages.name, "evaluate": dict(stages.evaluate), "stages": []}
    with locked(folder / "lock"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*its masks are not, so pruned")  # they go another way
        stages.check(folder)
        StudyRun.check([spec for spec in stages.specs if not RunFolder(folder / spec.key).finished])
        for spec in stages.specs:
            content["stages"].append(_done(stages, spec, folder))
            write_whole(folder / "stages.json", json.dumps(finite(content), indent=1) + "\n")
    if options.json:
        show_json(content, sys.stdout)
    else:
        show([_table(content)], sys.stdout)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pl-prune adversarial",
        description="Pretrain robustly, search masks and fine-tune, each stage a run that starts from the one before; clean and robust "
        "accuracy before and after fine-tuning. An interrupted command goes on where it was. Further options are settings of one "
        "stage, --search.prune.sparsity=0.95 say.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the stage file")
    parser.add_argument("--folder", help="where the stages' runs and stages.json go; default: adversarial/NAME")
    parser.add_argument("--seed", type=int, help="seed_everything of all stages; default: those of the configuration")
    parser.add_argument("--weights", help="weights to start from in the place of the stage pretrain")
    parser.add_argument("--json", action="store_true", help="print the content of stages.json")
    return parser


def _done(stages: Stages, spec: Spec, folder: Path) -> dict[str, Any]:
    """Bring a stage to its end, and tell what it reached."""
    from pl_prune.commands.study_run import StudyRun
    from pl_prune.runs.asked import note
    from pl_prune.runs.folder import RunFolder
    from pl_prune.runs.stages import network

    work = RunFolder(folder / spec.key)
    if not work.finished:
        _say(
            f"{spec.key}: {'resumed' if work.checkpoint else 'started'}, a line for each epoch in {work.path / 'metrics.jsonl'}"
        )
        ready = stages.ready(spec, folder)
        note(spec, work)
        StudyRun.train(ready, work)
    checkpoint, result = network(work.path), work.result()
    told = {"stage": spec.key, "folder": str(work.path), "checkpoint": str(checkpoint)}
    told |= {name: result[name] for name in _TOLD}
    if spec.key != "pretrain":
        _say(f"{spec.key}: under attack")
        measured = _measure(checkpoint, work.path, stages.evaluate)
        told |= {**{name: measured[name] for name in _MEASURED}, "gap": measured["clean"] - measured["robust"]}
    return told


def _measure(checkpoint: Path, folder: Path, evaluate: Mapping[str, Any]) -> dict[str, Any]:
    from pl_prune.commands import attack
    from pl_prune.runs.spec import arguments

    words = arguments({name.replace("_", "-"): value for name, value in evaluate.items() if value is not None})
    words += arguments({"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"})
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        attack.run(["--ckpt", str(checkpoint), "--folder", str(folder), *words, "--json"])
    (found,) = json.loads(said.getvalue())["models"]
    return dict(found)


def _table(content: Mapping[str, Any]) -> Table:
    from pl_prune.report.table import Table

    rows = []
    for told in content["stages"]:
        accuracies = ["-"] * 3
        if "robust" in told:
            accuracies = [*(_with_interval(told, name) for name in ("clean", "robust")), f"{100 * told['gap']:.2f}"]
        rows.append([told["stage"], f"{told['sparsity']:.4f}", *accuracies, f"{told['seconds']:.1f}"])
    return Table(["stage", "sparsity", "clean %", "robust %", "gap", "wall s"], rows)


def _with_interval(told: Mapping[str, Any], name: str) -> str:
    low, high = told[f"{name}_interval"]
    return f"{100 * told[name]:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def _say(text: str) -> None:
    sys.stderr.write(f"pl-prune adversarial: {text}\n")
