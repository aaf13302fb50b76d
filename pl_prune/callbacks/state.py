"""`MaskState`: masks that travel through checkpoints, and fits that do not go on without theirs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pl_prune.callbacks.refusals import MARK, of_tuner, refuse_file, refuse_orphans, refuse_other_lightning
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, plain


class MaskState(Callback, ABC):
    """Save masks with every checkpoint, and refuse to resume under other settings or without them.

    Args:
        name: Tells several callbacks of one class apart, in checkpoints too.

    Attributes:
        masks: The masks in force; None before they are made.
        pruning_seconds: Time spent on making them.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.masks: MaskSet | None = None
        self.pruning_seconds = 0.0
        self._restored = False
        self._restored_settings = ""
        self._stage = "fit"
        self._reading = False  # between setup and the moment a checkpoint is read
        self._stale: Any = None
        self._tuning = False

    @property
    @abstractmethod
    def settings(self) -> str:
        """What a resume must not change, in one line."""

    @property
    def state_key(self) -> str:
        """Class and name, never hyper-parameters."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    def progress(self) -> dict[str, Any]:
        """Return what a resume needs beside the masks.

        Returns:
            Tensors and plain containers only.
        """
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Take what `progress` returned.

        Args:
            state: The whole state of this callback; a `KeyError`, `TypeError` or `ValueError` means that it is damaged.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expect a checkpoint, if this is a fit.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        refuse_other_lightning(trainer)
        self._stage = stage
        self._reading, self._stale = stage == "fit", trainer.ckpt_path  # which is that of an earlier fit
        if stage == "fit":
            self._restored = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the file if a checkpoint cannot be read.

        Args:
            trainer: The trainer.
            pl_module: The module.
            exception: What was raised.
        """
        reading, self._reading = self._reading and trainer.ckpt_path != self._stale, False
        if reading:
            refuse_file(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        """Return the packed masks and where they come from.

        Returns:
            Tensors and plain containers only, so that `torch.load(weights_only=True)` reads it; empty before the
            masks are made. Names are those of the module before `torch.compile`.
        """
        if self.masks is None:
            return {}
        return {
            MARK: 1,
            "settings": self.settings,
            "masks": renamed(self.masks, plain).state_dict(),
            "pruning_seconds": self.pruning_seconds,
            **self.progress(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the masks of a checkpoint.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            PruneError: If the state is damaged or of another version.
        """
        # To validate, test or predict needs no masks: the weights hold the zeros.
        if self._stage != "fit" or self._tuning:
            return
        if state_dict.get(MARK) != 1 or "masks" not in state_dict:
            raise PruneError(
                f"Expected the state of a pruning callback, version 1, under {self.state_key!r}; found keys {sorted(state_dict)} "
                f"and version {state_dict.get(MARK)!r}. Load a checkpoint written by this version of pl_prune."
            )
        self.masks = MaskSet.from_state_dict(state_dict["masks"])
        try:
            self.pruning_seconds = float(state_dict.get("pruning_seconds", 0.0))
            self.resume(state_dict)
        except (KeyError, TypeError, ValueError) as error:
            raise PruneError(
                f"Expected the whole state of {self.state_key!r} in the checkpoint; found it damaged ({error!r}). "
                "Load another checkpoint of the run."
            ) from error
        self._restored = True
        self._restored_settings = state_dict.get("settings", "")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume when the checkpoint holds masks that nobody here takes.

        Args:
            trainer: The trainer.
            pl_module: The module.
            checkpoint: The whole checkpoint.
        """
        self._reading = False
        present = {cb.state_key for cb in trainer.callbacks if isinstance(cb, MaskState)}  # type: ignore[attr-defined]
        refuse_orphans(trainer, checkpoint, present)
        self._tuning = of_tuner(trainer)

    def _check_resumed(self, trainer: Trainer) -> None:
        """Raise if a checkpoint gave no masks, or masks made with other settings."""
        self._reading = False
        if trainer.ckpt_path and not self._restored and not of_tuner(trainer):
            raise PruneError(
                f"Expected the masks of {self.state_key!r} in the checkpoint {str(trainer.ckpt_path)!r}; "
                "found no such state (a weights-only "
                "checkpoint, one of a run without this callback, or a renamed callback). Resume from a full checkpoint of a "
                "run with this callback and this name, or start a new fit from its weights alone (--weights on the command line)."
            )
        if self._restored and self._restored_settings != self.settings:
            raise PruneError(
                f"Expected the settings that the checkpoint's masks were made with, {self._restored_settings!r}; found {self.settings!r}. "
                "Resume with the same settings, or start a new fit from the checkpoint's weights (whose zeros GradualPruning keeps with "
                "start_from='zeros')."
            )


def renamed(masks: MaskSet, rename: Callable[[str], str]) -> MaskSet:
    """Give masks other names.

    Args:
        masks: The masks.
        rename: From an old name to the new one.

    Returns:
        The same masks under the new names.
    """
    return MaskSet({rename(name): mask for name, mask in masks.items()})
