"""`RunRecord`: a fit whose folder says what was run, what came of it, and whether it was finished."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pl_prune.callbacks.base import pruning_callbacks
from pl_prune.callbacks.refusals import refuse_other_lightning
from pl_prune.callbacks.report import run_folder, units_of
from pl_prune.core import sync
from pl_prune.core.masks import MaskSet
from pl_prune.core.store import read_header
from pl_prune.core.types import PruneError, Scores
from pl_prune.runs.folder import RunFolder


class RunRecord(Callback):
    """Write a run's environment, metrics, scores, masks and result into its folder, and never over a finished run.

    The folder is the logger's own (`save_dir/name/version`). Without a logger, and in `fast_dev_run`, nothing is written.
    Scores are written as soon as masks have been made from them, and not kept; of `GradualPruning`, those of the last
    change of the masks; scores of whole units when training starts. `pl-prune fit` adds this callback.
    """

    def __init__(self) -> None:
        self._run: RunFolder | None = None
        self._open = ExitStack()
        self._start = 0.0
        self._scored = False  # in this fit
        self._line: dict[str, int] | None = None
        self._seen: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the folder.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        refuse_other_lightning(trainer)
        if stage != "fit" or trainer.logger is None or trainer.fast_dev_run:
            return
        error = None
        try:
            if trainer.is_global_zero:
                refuse_finished(trainer)
                self._take(RunFolder(run_folder(trainer)))
                for callback in pruning_callbacks(trainer):
                    callback.keep_scores = self._keep
        except PruneError as caught:
            error = caught
        sync.agree(error)

    def _take(self, run: RunFolder) -> None:
        self._open.enter_context(run.locked())
        self._run = run
        self._start = perf_counter()
        self._scored = False
        self._line, self._seen = None, {}
        _forget_peak()

    def _keep(self, scores: Scores, about: dict[str, Any]) -> None:
        assert self._run is not None
        about = {**about, "seed": _seed()}
        if self._scored:  # by another callback, of other parameters
            scores = {**(self._run.scores() or {}), **scores}
            about["before"] = read_header(self._run.path / "scores.safetensors")["meta"]
        self._run.keep_scores(scores, about)
        self._scored = True

    def _keep_units(self, trainer: Trainer) -> None:
        """Write what was scored in `setup` or `on_fit_start`, by the first callback that prunes units."""
        for callback in pruning_callbacks(trainer):
            if callback.unit_scores is not None and callback.units is not None:
                assert self._run is not None
                about = {"method": callback.method, "criterion": getattr(callback, "criterion", None), "seed": _seed()}
                self._run.keep_units(callback.unit_scores, callback.units[1], about)
                return

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the environment.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._run is not None:
            if trainer.global_step == 0:
                for name in ("unit_scores", "unit_masks", *(() if self._scored else ("scores",))):
                    (self._run.path / f"{name}.safetensors").unlink(missing_ok=True)  # of a fit that came to nothing
                self._keep_units(trainer)
            self._run.begin(trainer.global_step)
            self._start -= sum(record["seconds"] for record in self._run.metrics()[-1:])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the epoch's metrics.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._run is not None:
            self._write(trainer, {"epoch": trainer.current_epoch, "step": trainer.global_step})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the line of the epoch before: a module's own `on_train_epoch_end` comes after that of callbacks.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._run is not None and self._line is not None:
            self._write(trainer, self._line)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was measured, for a run that is resumed from a checkpoint of this moment.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if not trainer.sanity_checking:
            self._seen = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}

    def _write(self, trainer: Trainer, line: dict[str, int]) -> None:
        assert self._run is not None
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        self._run.log({**line, "seconds": round(perf_counter() - self._start, 3), **self._seen, **metrics})
        self._line, self._seen = line, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured and is not written yet.

        Returns:
            Metrics by name.
        """
        return {"seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was measured before the checkpoint.

        Args:
            state_dict: As `state_dict` returns it.
        """
        self._seen = dict(state_dict["seen"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the masks and the result.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._run is None:
            return
        if self._line is not None:
            self._write(trainer, self._line)
        pruning = [cb for cb in pruning_callbacks(trainer) if cb.masks is not None]
        masks = MaskSet({})
        for callback in pruning:
            assert callback.masks is not None
            masks = masks.intersect(callback.masks)
        result = {
            "method": "; ".join(cb.method for cb in pruning) or "dense",
            "sparsity": masks.sparsity(),
            "removed": next((u.removed for cb in pruning if (u := units_of(cb)) is not None), 0.0),
            "masks": masks.digest() if masks else None,
            "seed": _seed(),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
            "seconds": round(perf_counter() - self._start, 3),
            "pruning_seconds": round(sum(cb.pruning_seconds for cb in pruning), 3),
            "peak_bytes": _peak(),
        }
        about = {
            "method": result["method"],
            "seed": _seed(),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            **({"units": True} if any(cb.units is not None for cb in pruning) else {}),
        }
        self._run.finish(result, masks, about)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the folder go.

        Args:
            trainer: The trainer.
            pl_module: The module.
            exception: What was raised.
        """
        self._let_go(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the folder go.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        self._let_go(trainer)

    def _let_go(self, trainer: Trainer) -> None:
        if self._run is not None:
            for callback in pruning_callbacks(trainer):
                callback.keep_scores = None
        self._open.close()
        self._run = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": ExitStack(), "_run": None}


def refuse_finished(trainer: Trainer) -> None:
    """Raise if a fit would write over a finished run.

    Args:
        trainer: A trainer about to fit.

    Raises:
        PruneError: If its folder holds one.
    """
    if trainer.logger is None or trainer.fast_dev_run:
        return
    run = RunFolder(run_folder(trainer))
    if run.finished:
        raise PruneError(
            f"Expected a folder without a finished run; found one in {str(run.path)!r}. "
            "Choose another (trainer.logger.init_args.version, say), or delete it."
        )


def _seed() -> int | None:
    return int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here


def _peak() -> int | None:
    """Return the peak of memory: allocated on the GPU, or resident, where the system says so."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
