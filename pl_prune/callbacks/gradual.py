"""`GradualPruning`: masks that grow while the network trains."""

from __future__ import annotations

from math import ceil, inf
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.bridge import Bridge
from pl_prune.core import sync
from pl_prune.core.allocate import Allocation, Global
from pl_prune.core.criterion import Criterion
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.schedule import Cubic, Schedule
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError, check_choice, check_type, describe, prune_count
from pl_prune.criteria.magnitude import Magnitude


class GradualPruning(PruningCallback):
    """Prune a network step by step while it trains, and keep what is pruned at zero.

    Masks change before the first batch after the optimizer step that the schedule names, so a checkpoint always holds the
    network that was validated. Steps are real steps of the first optimizer that holds prunable weights: accumulated
    batches and steps that a GradScaler skips do not count. What is pruned stays pruned.

    Args:
        criterion: How to score, each time anew.
        schedule: Which sparsity holds after how many optimizer steps.
        allocation: Where the kept entries go.
        select: Which parameters are prunable.
        samples: Which samples the scores see, the same ones each time, for criteria that need data.
        start_from: "zeros" never lets a weight back that is zero when the fit starts (a pruned network that is pruned
            further); "dense" starts from masks that keep everything.
        rewind_to: An optimizer step. After each change of the masks, the module (parameters and buffers) goes back to
            what it was then, and the optimizers forget their momenta. None: training goes on from where it is.
        name: Tells several callbacks of this class apart.

    Raises:
        PruneError: If an argument is not of its kind, or masks change before `rewind_to`.

    Source:
        Zhu and Gupta, To prune, or not to prune (`Cubic`, the defaults). With `Exponential` and `rewind_to`, iterative
        magnitude pruning with rewinding: Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis,
        algorithm 2. Divergence: learning-rate schedules run on, so one that is to start again with each round has to
        be periodic.
    """

    def __init__(
        self,
        criterion: Criterion = Magnitude(),
        schedule: Schedule = Cubic(final=0.9),
        allocation: Allocation = Global(),
        select: Select = Select(),
        samples: Samples = Samples(),
        start_from: Literal["dense", "zeros"] = "dense",
        rewind_to: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(select, samples, name)
        check_type("criterion", criterion, Criterion, "for example pl_prune.Magnitude()")
        check_type("schedule", schedule, Schedule, "for example pl_prune.Cubic(final=0.9)")
        check_type("allocation", allocation, Allocation, "for example pl_prune.ERK()")
        check_type("select", select, Select, "for example pl_prune.Select(exclude=['head'])")
        check_type("samples", samples, Samples, "for example pl_prune.Samples(per_class=10)")
        check_choice("start_from", start_from, ("dense", "zeros"))
        if rewind_to is not None and not _is_step(rewind_to):
            raise PruneError(
                f"Expected rewind_to to be a whole number of optimizer steps, 0 or more; found {rewind_to!r}. "
                "Leave it out to train on without rewinding."
            )
        early = [step for step in range(rewind_to or 0) if schedule.due(step) and schedule.sparsity(step) > 0]
        if early:
            raise PruneError(
                f"Expected no change of the masks before the step to rewind to, {rewind_to}; found one at step {early[0]}. "
                "Let the schedule start later."
            )
        self.criterion = criterion
        self.schedule = schedule
        self.allocation = allocation
        self.start_from = start_from
        self.rewind_to = rewind_to
        self._begin()

    def _begin(self) -> None:
        self._steps = 0  # real steps of the optimizer
        self._seen = -1  # the last step whose changes are made
        self._origin: dict[str, Tensor] | None = None  # what to rewind to
        self._counter: RemovableHandle | None = None

    @property
    def method(self) -> str:
        """Criterion, allocation and schedule."""
        rewound = "" if self.rewind_to is None else f", rewound to step {self.rewind_to}"
        return f"{describe(self.criterion)} by {describe(self.schedule)}, {describe(self.allocation)}{rewound}"

    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Keep everything, or everything that is not zero.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            The same masks on every rank.
        """
        self._begin()
        names = bridge.selected()
        live = dict(bridge.pl_module.named_parameters())
        params = {name: live[name] for name in names}
        make = MaskSet.from_zeros if self.start_from == "zeros" else MaskSet.ones_like
        return sync.masks_of_rank_zero(lambda: make(params), bridge.pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count optimizer steps from here on, and refuse a fit that ends before the schedule does.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            PruneError: If the last change of the masks would never train.
        """
        assert self.masks is not None
        live = dict(pl_module.named_parameters())
        pruned = {id(live[name]) for name in self.masks}
        stepping = [
            o for o in trainer.optimizers if pruned & {id(p) for group in o.param_groups for p in group["params"]}
        ]
        for optimizer in (stepping or trainer.optimizers)[:1]:  # frozen weights are in none
            self._counter = optimizer.register_step_post_hook(self._count)
        end = self._steps + _steps_left(trainer)
        if pl_module.automatic_optimization and not trainer.fast_dev_run and self.schedule.last >= end:
            raise PruneError(
                f"Expected a fit that trains after the last change of the masks, at optimizer step {self.schedule.last}; "
                f"found one of {end:.0f} steps. Train longer, or let the schedule end sooner."
            )
        selecting = [cb for cb in trainer.checkpoint_callbacks if isinstance(cb, ModelCheckpoint) and cb.monitor]
        if selecting and self._steps < self.schedule.last:
            rank_zero_warn(
                f"ModelCheckpoint keeps the best {selecting[0].monitor!r}, which may be that of a network not yet pruned to the end "
                f"(step {self.schedule.last}). Keep the last checkpoint too (save_last=True), and look at its sparsity."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change the masks where the schedule says so.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch to come.
            batch_idx: Its number.
        """
        assert self._bridge is not None
        assert self.masks is not None
        new, self._seen = range(self._seen + 1, self._steps + 1), self._steps
        if self.rewind_to in new:
            state = pl_module.state_dict()
            self._origin = {name: t.detach().clone() for name, t in state.items() if isinstance(t, Tensor)}
        if any(self.schedule.due(step) for step in new):
            self._prune(self._bridge, self.masks)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if the schedule has not come to its end.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._seen < self.schedule.last and not trainer.fast_dev_run:
            assert self.masks is not None
            rank_zero_warn(
                f"{self.state_key}: the fit ended after {self._steps} optimizer steps, before the schedule did (step "
                f"{self.schedule.last}): the sparsity is {self.masks.sparsity():.4f}, not {self.schedule.sparsity(self.schedule.last)}."
            )

    def progress(self) -> dict[str, Any]:
        """Return the counters, and what to rewind to.

        Returns:
            Plain numbers and tensors.
        """
        return {"steps": self._steps, "seen": self._seen, "origin": self._origin}

    def resume(self, state: dict[str, Any]) -> None:
        """Take them back.

        Args:
            state: The state of this callback.
        """
        origin = state["origin"]
        self._steps, self._seen = int(state["steps"]), int(state["seen"])
        self._origin = None if origin is None else {name: t.clone() for name, t in dict(origin).items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_counter": None}

    def _detach(self) -> None:
        super()._detach()
        if self._counter is not None:
            self._counter.remove()
            self._counter = None

    def _count(self, *_: Any) -> None:
        self._steps += 1

    def _prune(self, bridge: Bridge, masks: MaskSet) -> None:
        total = sum(size for _, size in masks.counts().values())
        target = self.schedule.sparsity(self._steps)
        if total - prune_count(target, total) >= sum(kept for kept, _ in masks.counts().values()):
            return
        with self.timed():
            new, _ = bridge.prune(self.criterion, self.allocation, target, within=masks)
        emptied = [name for name, (kept, _) in new.counts().items() if not kept and masks.counts()[name][0]]
        if emptied:
            rank_zero_warn(
                f"{self.method}: expected every layer to keep a weight; found {len(emptied)} layers empty from sparsity "
                f"{target:.4f} on ({', '.join(emptied[:5])}). Lower it, set allocation.min_per_layer, or use ERK or Layerwise."
            )
        if self._origin is not None:
            self._rewind(bridge, self._origin)
        self._put_in_force(bridge, new, fresh=self._origin is not None)
        rank_zero_info(f"{self.state_key}: step {self._steps}, sparsity {new.sparsity():.4f}.")
        for logger in bridge.trainer.loggers:
            logger.log_metrics({"sparsity/prunable": new.sparsity()}, step=bridge.trainer.global_step)

    @torch.no_grad()
    def _rewind(self, bridge: Bridge, origin: dict[str, Tensor]) -> None:
        state = bridge.pl_module.state_dict()
        for name, value in origin.items():
            if name not in state or state[name].shape != value.shape:
                raise PruneError(
                    f"Expected the module to hold {name!r} of shape {tuple(value.shape)}, to rewind it; found "
                    f"{tuple(state[name].shape) if name in state else 'none'}. Resume with the network that the run began with."
                )
            state[name].copy_(value)
        for optimizer in bridge.trainer.optimizers:
            optimizer.state.clear()


def _steps_left(trainer: Trainer) -> float:
    """Return how many optimizer steps the fit still has, infinite where nobody knows."""
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes from epoch to epoch
        return inf
    if any(getattr(cb, "_model_contains_batch_norm", False) for cb in trainer.callbacks):  # type: ignore[attr-defined]
        # StochasticWeightAveraging adds an epoch without steps, for the batch norms.
        epochs = (trainer.max_epochs or 0) - 1
        steps = min(steps, epochs * ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    return steps - trainer.global_step if steps >= 0 else inf


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
