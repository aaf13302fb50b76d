"""`GradualPruning`: masks that grow while the network trains."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pl_prune.callbacks.base import PruningCallback, pruning_callbacks
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.horizon import steps_left, warn_of_best
from pl_prune.callbacks.rewind import rewind, snapshot
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
            what it was then, the weights of other pruning callbacks included, and the optimizers forget their momenta.
            None: training goes on from where it is.
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
        more = ", from zeros" if self.start_from == "zeros" else ""
        more += "" if self.rewind_to is None else f", rewound to step {self.rewind_to}"
        return f"{describe(self.criterion)} by {describe(self.schedule)}, {describe(self.allocation)}{more}"

    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Keep everything, or everything that is not zero.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            The same masks on every rank.

        Raises:
            PruneError: If more weights are zero than the schedule ever asks for.
        """
        self._begin()
        params = bridge.selected()
        make = MaskSet.from_zeros if self.start_from == "zeros" else MaskSet.ones_like
        masks = sync.masks_of_rank_zero(lambda: make(params), bridge.pl_module.device)
        final, total = self.schedule.sparsity(self.schedule.last), sum(p.numel() for p in params.values())
        if (found := round(masks.sparsity() * total)) > prune_count(final, total):
            raise PruneError(
                f"Expected zeros in at most {final} of the selected weights, since they do not come back; found {found} of {total} "
                f"({found / total:.6f}). Ask for that sparsity or more, or start from 'dense'."
            )
        return masks

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
        ones = {name: torch.ones(mask.shape) for name, mask in self.masks.items()}
        last = max(self.schedule.sparsity(self.schedule.last), self.masks.sparsity())
        self.allocation(ones, last, self.masks)  # floors that cannot hold in the end are refused now
        end = self._steps + steps_left(trainer)
        if pl_module.automatic_optimization and not trainer.fast_dev_run and self.schedule.last >= end:
            raise PruneError(
                f"Expected a fit that trains after the last change of the masks, at optimizer step {self.schedule.last}; "
                f"found one of {end:.0f} steps. Train longer, or let the schedule end sooner."
            )
        if self._steps < self.schedule.last:
            warn_of_best(trainer, self.schedule.last)

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
        new = range(self._seen + 1, self._steps + 1)
        if self.rewind_to in new:
            self._origin = snapshot(pl_module)
        if any(self.schedule.due(step) for step in new):
            self._prune(self._bridge, self.masks)
        self._seen = self._steps  # last: a change that fails is still due
        if self._seen >= self.schedule.last:
            self._origin = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if the schedule has not come to its end.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._seen < self.schedule.last:
            assert self.masks is not None
            say = rank_zero_info if trainer.fast_dev_run else rank_zero_warn
            say(
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
        start = perf_counter()
        new, scores = bridge.prune(self.criterion, self.allocation, target, within=masks)
        self.pruning_seconds += perf_counter() - start
        if self._steps >= self.schedule.last:
            self._hand_over(bridge, scores, self.criterion, sparsity=target)
        emptied = [name for name, (kept, _) in new.counts().items() if not kept and masks.counts()[name][0]]
        if emptied:
            rank_zero_warn(
                f"{self.method}: expected every layer to keep a weight; found {len(emptied)} layers empty from sparsity "
                f"{target:.4f} on ({', '.join(emptied[:5])}). Lower it, set allocation.min_per_layer, or use ERK or Layerwise."
            )
        if self._origin is not None:
            rewind(bridge, self._origin, pruning_callbacks(bridge.trainer))
        self._put_in_force(bridge, new, fresh=self._origin is not None)
        rank_zero_info(f"{self.state_key}: step {self._steps}, sparsity {new.sparsity():.4f}.")
        for logger in bridge.trainer.loggers:
            logger.log_metrics({"sparsity/prunable": new.sparsity()}, step=bridge.trainer.global_step)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
