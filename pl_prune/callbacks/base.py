"""`PruningCallback`: every rule that Lightning forces on a pruning callback, once."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from pl_prune.callbacks.averaging import prune_averages
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.refusals import MARK, of_tuner, refuse_file, refuse_orphans, refuse_trainer, warn_of_weights
from pl_prune.core import sync
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import Params, PruneError, describe, plain
from pl_prune.optim.attach import Enforcement


class PruningCallback(Callback, ABC):
    """Make masks, keep them in force, and carry them through checkpoints.

    Parameter objects and names never change; masks live in the callback's state, so a checkpoint's `state_dict` loads
    strictly into
    the plain module. A checkpoint without this callback's state is refused: a pruned run never goes on densely
    unnoticed.

    Args:
        select: Which parameters are prunable; None for none.
        samples: Which samples the scores see.
        name: Tells several pruning callbacks of one class apart, in checkpoints too.

    Attributes:
        masks: The masks in force; None before they are made.
        pruning_seconds: Time spent on making them.
    """

    def __init__(self, select: Select | None, samples: Samples, name: str | None = None) -> None:
        self.select = select
        self.samples = samples
        self.name = name
        self.masks: MaskSet | None = None
        self.pruning_seconds = 0.0
        self._restored = False
        self._restored_settings = ""
        self._stage = "fit"
        self._reading = False  # between setup and the moment a checkpoint is read
        self._stale: Any = None
        self._tuning = False
        self._model: weakref.ref[LightningModule] | None = None
        self._enforcement: Enforcement | None = None
        self._bridge: Bridge | None = None

    @abstractmethod
    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Make the masks that hold from the start of the fit.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            The same masks on every rank.
        """

    @property
    @abstractmethod
    def method(self) -> str:
        """The method and its settings, in one line."""

    @property
    def settings(self) -> str:
        """The method, what it prunes and what it scores on: what a resume must not change."""
        samples = replace(self.samples, batch_size=Samples().batch_size)
        return f"{self.method}, {describe(self.select)}, {describe(samples)}"

    @property
    def state_key(self) -> str:
        """Class and name, never hyper-parameters."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be pruned honestly, before any work.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        self._stage = stage
        self._reading, self._stale = stage == "fit", trainer.ckpt_path  # which is that of an earlier fit
        if stage == "fit":
            self._restored = False
            refuse_trainer(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the masks, or take them from the checkpoint, and put them in force.

        Args:
            trainer: The trainer.
            pl_module: The module, on its device, with its weights loaded and its optimizers built.

        Raises:
            PruneError: If the checkpoint lacks this callback's state, another callback prunes the same
                parameters, or scoring fails.
        """
        self._reading = False
        if self.select is None:
            return
        self._bridge = Bridge(trainer, pl_module, self.select, self.samples)
        self._refuse_overlap(trainer, pl_module, self.select)
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
        same_model = self._model is not None and self._model() is pl_module
        if self.masks is None or not (self._restored or same_model):
            start = perf_counter()
            self.masks = self.make_masks(self._bridge)
            self.pruning_seconds = perf_counter() - start
        sync.check_same(self.masks)
        if self._restored:
            warn_of_weights(dict(pl_module.named_parameters()), self.masks, str(trainer.ckpt_path))
        self._model = weakref.ref(pl_module)
        self._put_in_force(self._bridge, self.masks, fresh=not self._restored)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned entries before clipping sees them.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The optimizer about to step.
        """
        if self._enforcement is not None and pl_module.automatic_optimization:
            self._enforcement.zero_grads()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove every hook, and name the file if a checkpoint cannot be read.

        Args:
            trainer: The trainer.
            pl_module: The module.
            exception: What was raised.
        """
        self._detach()
        reading, self._reading = self._reading and trainer.ckpt_path != self._stale, False
        if reading:
            refuse_file(trainer, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove every hook.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        self._detach()

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
            "masks": _renamed(self.masks, plain).state_dict(),
            "pruning_seconds": self.pruning_seconds,
            **self.progress(),
        }

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

        Raises:
            PruneError: If masks would be lost; names their keys and the callbacks present.
        """
        self._reading = False
        refuse_orphans(trainer, checkpoint, {cb.state_key for cb in pruning_callbacks(trainer)})
        self._tuning = of_tuner(trainer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_enforcement": None, "_bridge": None}

    def _put_in_force(self, bridge: Bridge, masks: MaskSet, fresh: bool) -> None:
        """Enforce masks from now on; `fresh` where averages start anew from the weights as they are."""
        trainer, pl_module = bridge.trainer, bridge.pl_module
        live = dict(pl_module.named_parameters())
        names = {plain(name): name for name in live}
        masks = _renamed(masks, lambda name: names.get(plain(name), name))
        masks.check_fits(live)
        if self._enforcement is not None:
            self._enforcement.detach()
        params: Params = {name: live[name] for name in masks}
        self._enforcement = Enforcement(params, masks)
        self.masks = self._enforcement.masks
        self._enforcement.attach(trainer.optimizers, gradient_hooks=not pl_module.automatic_optimization)
        prune_averages(trainer, pl_module, self.masks, fresh)

    def _detach(self) -> None:
        if self._enforcement is not None:
            self._enforcement.detach()
        self._enforcement = self._bridge = None

    def _refuse_overlap(self, trainer: Trainer, pl_module: LightningModule, select: Select) -> None:
        for other in pruning_callbacks(trainer):
            if other is not self and other.select is not None:
                mine = Bridge(trainer, pl_module, select, self.samples).selected()
                theirs = Bridge(trainer, pl_module, other.select, self.samples).selected()
                if shared := [name for name in theirs if name in mine]:
                    raise PruneError(
                        f"Expected one pruning callback for each parameter; found {self.state_key!r} and {other.state_key!r} both "
                        f"on {shared[0]!r} and {len(shared) - 1} more. Remove one, or part them with `select.include` and `select.exclude`."
                    )


def pruning_callbacks(trainer: Trainer) -> list[PruningCallback]:
    """Return the trainer's pruning callbacks.

    Args:
        trainer: The trainer.

    Returns:
        In the trainer's order.
    """
    return [cb for cb in trainer.callbacks if isinstance(cb, PruningCallback)]  # type: ignore[attr-defined]


def _renamed(masks: MaskSet, rename: Callable[[str], str]) -> MaskSet:
    return MaskSet({rename(name): mask for name, mask in masks.items()})
