"""`pl-prune fit`, `validate`, `test` and `predict`: LightningCLI, with the key `prune`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pl_prune.commands.json_option import without_json

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run(argv: Sequence[str]) -> int:
    """Hand the arguments to LightningCLI.

    Args:
        argv: The command and what follows it.

    Returns:
        Exit status: 0.
    """
    from pl_prune.cli import PruneCLI
    from pl_prune.report.terminal import show_json

    words, as_json, quiet = without_json(argv)
    with quiet:
        trainer = PruneCLI(args=words).trainer
    if as_json and trainer.is_global_zero:
        show_json(_outcome(words[0], trainer), sys.stdout)
    return 0


def _outcome(command: str, trainer: Trainer) -> dict[str, Any]:
    """Return what a command came to: its metrics, and of a fit its folder, of predictions their number."""
    if command == "predict":
        return {"batches": trainer.predict_loop.batch_progress.total.completed}
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    if command != "fit":
        return {"metrics": metrics}
    from pl_prune.callbacks.report import run_folder
    from pl_prune.runs.folder import RunFolder

    run = RunFolder(run_folder(trainer)) if trainer.logger and not trainer.fast_dev_run else None
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return {
        "folder": str(run.path) if run else None,
        "checkpoint": checkpoint or None,
        "metrics": metrics,
        "result": run.result() if run else None,
    }
