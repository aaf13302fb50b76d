"""What a trainer or a checkpoint must not be, for every pruning callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from pl_prune.core.types import PruneError

MARK = "pl_prune"
"""The key by which the state of a pruning callback is known in a checkpoint."""


def refuse_trainer(trainer: Trainer) -> None:
    """Raise where pruning could not be honest, and warn where its results are not what one may think.

    Args:
        trainer: A trainer about to fit.

    Raises:
        PruneError: If its strategy shards parameters, or another tool prunes.
    """
    strategy = trainer.strategy
    if strategy.restore_checkpoint_after_setup:
        raise PruneError(
            f"Expected a strategy that keeps whole parameters (single device, DDP); found {type(strategy).__name__}, which "
            "shards them. Train with strategy='ddp'."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            "A launcher that spawns or forks returns the weights alone: the masks stay in the processes it started, and in checkpoints. "
            "Take them by MaskSet.from_zeros, or train with strategy='ddp'."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateFinder):
            rank_zero_warn(
                "LearningRateFinder ends before the network is pruned: it finds the learning rate of the dense network, and a sparse "
                "one may want another."
            )
        if isinstance(callback, ModelPruning):
            raise PruneError(
                "Expected one tool that prunes; found Lightning's ModelPruning, which renames the parameters, beside pl_prune. Remove it."
            )


def of_tuner(trainer: Trainer) -> bool:
    """Say whether the last checkpoint loaded is one that the learning-rate or batch-size finder wrote within this fit.

    Args:
        trainer: The trainer.

    Returns:
        True for a tuner's own file.
    """
    return Path(str(trainer.ckpt_path or "")).name.startswith((".lr_find_", ".scale_batch_size_"))


def refuse_file(path: str, error: Exception) -> NoReturn:
    """Name the checkpoint that cannot be read.

    Args:
        path: The file.
        error: What Lightning or torch raised.

    Raises:
        PruneError: In any case.
    """
    raise PruneError(
        f"Expected a whole checkpoint of this network in {path!r}; found that it cannot be read "
        f"({type(error).__name__}: {error}). If the file is damaged, resume from another one; "
        "else build the network that it was made with."
    ) from error


def refuse_orphans(trainer: Trainer, checkpoint: dict[str, Any], present: set[str]) -> None:
    """Raise if a fit would resume a pruned run without its masks.

    Args:
        trainer: The trainer.
        checkpoint: The whole checkpoint.
        present: The keys of the trainer's pruning callbacks.

    Raises:
        PruneError: If the checkpoint holds masks under a key that no callback has.
    """
    states = checkpoint.get("callbacks") or {}
    held = {key for key, state in states.items() if isinstance(state, dict) and MARK in state}
    if trainer.state.fn == TrainerFn.FITTING and (lost := sorted(held - present)):
        raise PruneError(
            f"Expected a callback for every set of masks in the checkpoint; found masks of {lost} "
            f"and the pruning callbacks {sorted(present)}. "
            "Give the trainer the callback (and the name) that the run was started with."
        )
