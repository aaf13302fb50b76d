"""`AroundSteps`: what Lightning asks of a callback that prunes around the optimizer's steps."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pl_prune.callbacks.averaging import prune_averages
from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.group_bridge import GroupBridge
from pl_prune.callbacks.horizon import steps_left, warn_of_best, warn_of_trial
from pl_prune.callbacks.shrinking import Rates, group_sparsity, is_logged, log_progress, write_small
from pl_prune.callbacks.state import renamed
from pl_prune.callbacks.trial import Trial
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import Params, PruneError, plain
from pl_prune.optim.hesso import Hesso
from pl_prune.optim.units import trainable


class AroundSteps(PruningCallback, ABC):
    """Find units, let `Hesso` work around the optimizers' steps, and carry it through checkpoints.

    Args:
        include: Shell patterns of layers; only their groups are pruned.
        exclude: Shell patterns of layers that stay whole.
        shrink_at_end: Write the smaller network to `small.safetensors` in the run's folder.
        name: Tells several callbacks of this class apart.

    Attributes:
        groups: The groups that are pruned; None before they are traced.
        hesso: What works around the optimizers' steps, within a fit.
    """

    def __init__(
        self, include: list[str] | None, exclude: list[str] | None, shrink_at_end: bool, name: str | None
    ) -> None:
        super().__init__(Select(output_layer=True), Samples(), name)
        self.include, self.exclude = include, exclude
        self.shrink_at_end = shrink_at_end
        self.groups: ParameterGroups | None = None
        self.hesso: Hesso | None = None
        self._seed = 0
        self._kept: dict[str, Any] | None = None  # the state of `hesso` between fits
        self._handles: list[RemovableHandle] = []
        self._trial: Trial | None = None
        self._rates = Rates()
        self._left = (0, 0)  # parameters and MACs
        self._held = 0.0  # by shrinking units, of all saliency
        self._say = False  # at the next end of a batch

    @abstractmethod
    def make_hesso(self, trainer: Trainer, pl_module: LightningModule, params: Params) -> Hesso:
        """Make what works around the steps.

        Args:
            trainer: The trainer.
            pl_module: The module.
            params: Its parameters by name (`plain`).

        Returns:
            It, before its first step.
        """

    @property
    def units(self) -> tuple[ParameterGroups, MaskSet] | None:
        """The groups, and which of their units are not zero."""
        if self.groups is None or self.masks is None:
            return None
        return self.groups, self.groups.collapse(self.masks)

    def progress(self) -> dict[str, Any]:
        """Return the groups, and how far they are.

        Returns:
            Tensors and plain containers only.
        """
        assert self.groups is not None
        hesso = self._kept if self.hesso is None else self.hesso.state_dict()
        return {"groups": self.groups.state_dict(), "hesso": hesso, "seed": self._seed}

    def resume(self, state: dict[str, Any]) -> None:
        """Take them back.

        Args:
            state: The whole state of this callback.
        """
        self.groups = ParameterGroups.from_state_dict(state["groups"])
        self._kept, self._seed = dict(state["hesso"]), int(state["seed"])

    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Find the units; all of them stay at first.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            The same masks on every rank.
        """
        traced = GroupBridge(bridge.trainer, bridge.pl_module, bridge.select, bridge.samples)
        groups = traced.trace(self.include, self.exclude, exact=True)
        self.groups = trainable(groups, _named(bridge.pl_module), bridge.trainer.optimizers)
        self._kept, self._rates = None, Rates()
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        rank_zero_info(
            f"{self.state_key}: {sum(self.groups.sizes.values()):,} units of {len(self.groups)} layers; "
            f"{len(self.groups.rejected)} layers stay whole."
        )
        return self.groups.expand({})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit that ends before the last unit is zero.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            PruneError: If it does.
        """
        hesso = self.hesso
        assert hesso is not None
        if hesso.finished:
            return
        needed, end = hesso.pace.end - hesso.steps, steps_left(trainer)
        cric = None if hesso.running or hesso.walk is not None else hesso.cric
        needed += cric.sampling_steps if cric else 0
        if pl_module.automatic_optimization and not trainer.fast_dev_run and needed > end:
            also = f" (at least {cric.sampling_steps} of them CRIC's)" if cric else ""
            raise PruneError(
                f"Expected a fit that goes on until the last unit is zero, {needed} optimizer steps from here{also}; found "
                f"one of {end:.0f} steps. Train longer, or lower start and duration."
            )
        if cric and not trainer.fast_dev_run:
            warn_of_trial(cric.most_samples(hesso.units.size, cric.tolerated + 1), end)
        warn_of_best(trainer, hesso.pace.end)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let CRIC take its place on trial.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch to come.
            batch_idx: Its number.
        """
        if self._trial is not None:
            self._trial.enter()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put weights and buffers back, if CRIC took their place.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._trial is not None:
            self._trial.leave()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Choose units if they are due, by gradients that are not clipped yet.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The optimizer about to step.
        """
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.hesso is not None:
            due = self.hesso.due
            self.hesso.before_step(optimizer)
            if due:
                self._rates.note(trainer.optimizers)
                self._held, self._say = self.hesso.share, True
            if self.hesso.running and is_logged(trainer):
                self._held = self.hesso.held(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how far pruning is.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What the step returned.
            batch: The batch.
            batch_idx: Its number.
        """
        if self._trial is not None:
            self._trial.leave()  # of a batch without backward pass
        if self.hesso is not None and (self._say or self.hesso.running or batch_idx == 0):
            log_progress(pl_module, self.hesso, self._left, self._held)
            self._say = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the weights into the checkpoint, also in the middle of a step that CRIC takes on trial.

        Args:
            trainer: The trainer.
            pl_module: The module.
            checkpoint: The whole checkpoint.
        """
        if self._trial is not None:
            self._trial.correct(checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what is left of every layer.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        hesso = self.hesso
        assert hesso is not None
        assert self.groups is not None
        if not hesso.finished:
            say = rank_zero_info if trainer.fast_dev_run else rank_zero_warn
            say(
                f"{self.state_key}: the fit ended after {hesso.steps} optimizer steps, before the last unit was zero (step "
                f"{hesso.pace.end}): {group_sparsity(hesso):.4f} of the units are."
            )
        rank_zero_info(f"\n{self.groups.report(hesso.keep())}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the smaller network.

        Args:
            trainer: The trainer.
            pl_module: The module, with averaged weights where they are averaged.
        """
        if self.shrink_at_end and not trainer.fast_dev_run and self.masks is not None and self.masks.sparsity():
            assert self.groups is not None
            write_small(trainer, pl_module, self.masks, self.groups)

    def __getstate__(self) -> dict[str, Any]:
        kept = self._kept if self.hesso is None else self.hesso.state_dict()
        return {**super().__getstate__(), "hesso": None, "_kept": kept, "_handles": [], "_trial": None}

    def _put_in_force(self, bridge: Bridge, masks: MaskSet, fresh: bool) -> None:
        """Work around the optimizers' steps from now on; nothing is enforced before the first unit is zero."""
        trainer, pl_module = bridge.trainer, bridge.pl_module
        self._detach_hooks()
        hesso = self.hesso = self.make_hesso(trainer, pl_module, _named(pl_module))
        if self._kept is not None:
            hesso.load_state_dict(self._kept)
        self._trial = Trial(hesso, pl_module)
        self._enforcement = hesso.enforcement
        self._enforcement.attach(trainer.optimizers, gradient_hooks=not pl_module.automatic_optimization)
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda stepped, *_: hesso.after_step(stepped)))

        def committed() -> None:
            self._show(bridge)
            self._say = True

        hesso.committed = committed
        self._show(bridge, fresh)

    def _show(self, bridge: Bridge, fresh: bool = False) -> None:
        """Let everyone see the zeros that there are by now."""
        hesso, trainer = self.hesso, bridge.trainer
        assert hesso is not None
        assert self.groups is not None
        names = {plain(name): name for name, _ in bridge.pl_module.named_parameters()}
        self.masks = renamed(hesso.masks(), names.__getitem__).to(bridge.pl_module.device)
        prune_averages(trainer, bridge.pl_module, self.masks, fresh)
        self._left = self.groups.cost(hesso.keep())
        if hesso.finished and not fresh and hesso.steps == hesso.pace.end:
            self._rates.warn(trainer.optimizers)

    def _detach_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _detach(self) -> None:
        if self._trial is not None:
            self._trial.leave()
        if self.hesso is not None:
            self._kept = self.hesso.state_dict()
        self.hesso = self._trial = None
        self._detach_hooks()
        super()._detach()


def _named(pl_module: LightningModule) -> Params:
    return {plain(name): p for name, p in pl_module.named_parameters()}
