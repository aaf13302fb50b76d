"""What a trainer or a checkpoint must not be, for every pruning callback."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, plain

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


def refuse_other_lightning(trainer: object) -> None:
    """Raise if the other Lightning runs a callback of ours: what it calls, and what it has, are not those that we know.

    Args:
        trainer: Whatever calls the callback.

    Raises:
        PruneError: If it is the Trainer of pytorch_lightning.
    """
    if any(base.__module__.startswith("pytorch_lightning") for base in type(trainer).__mro__):
        raise PruneError(
            "Expected the Trainer of the package lightning; found that of pytorch_lightning: the two do not mix in one project. "
            "Import from lightning.pytorch in place of pytorch_lightning, everywhere (import lightning.pytorch as pl)."
        )


def of_tuner(trainer: Trainer) -> bool:
    """Say whether the last checkpoint loaded is one that the learning-rate or batch-size finder wrote within this fit.

    Args:
        trainer: The trainer.

    Returns:
        True for a tuner's own file.
    """
    return Path(str(trainer.ckpt_path or "")).name.startswith((".lr_find_", ".scale_batch_size_"))


def refuse_file(trainer: Trainer, error: BaseException) -> None:
    """Name the checkpoint of this fit if it is what could not be read, after the trainer has shut down.

    Args:
        trainer: A trainer that has not come as far as `on_fit_start`.
        error: What was raised.

    Raises:
        PruneError: If the file could not be read.
    """
    read = bool(trainer._checkpoint_connector._loaded_checkpoint)
    if read or not trainer.ckpt_path or not isinstance(error, Exception) or isinstance(error, PruneError):
        return
    path = str(trainer.ckpt_path)
    for logger in trainer.loggers:
        logger.finalize("failed")
    trainer._teardown()
    trainer.state.stage = None
    if isinstance(error, FileNotFoundError):
        raise PruneError(f"Expected a checkpoint at {path!r}; found no such file. Look at the path.") from error
    raise PruneError(
        f"Expected a whole checkpoint in {path!r}; found that it cannot be read ({type(error).__name__}: {error}). "
        "The file is damaged or of another kind: resume from another one."
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


def warn_of_weights(params: Mapping[str, Tensor], masks: MaskSet, path: str) -> None:
    """Warn if the weights of a checkpoint are not zero where its masks prune.

    Args:
        params: The weights, by name.
        masks: The masks of the same checkpoint.
        path: The file.
    """
    weights = {plain(name): p.detach() for name, p in params.items()}
    masks.check_fits(weights)
    odd = [name for name, mask in masks.items() if bool(weights[name][~mask.to(weights[name].device)].any())]
    if odd:
        rank_zero_warn(
            f"Expected zeros wherever the masks of {path!r} prune; found other weights in {', '.join(odd[:5])}, which are zeroed again. "
            "Something wrote weights outside the optimizers, or changed the file."
        )
