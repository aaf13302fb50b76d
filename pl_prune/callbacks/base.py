"""`PruningCallback`: every rule that Lightning forces on a pruning callback, once."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from pl_prune.callbacks.averaging import prune_averages
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.refusals import refuse_trainer, warn_of_weights
from pl_prune.callbacks.state import MaskState, renamed
from pl_prune.core import sync
from pl_prune.core.archive import hash_tensors
from pl_prune.core.criterion import Criterion
from pl_prune.core.groups import GroupScores, ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import Params, PruneError, Scores, check_type, describe, plain
from pl_prune.optim.attach import Enforcement


class PruningCallback(MaskState, ABC):
    """Make masks, keep them in force, and carry them through checkpoints.

    Parameter objects and names never change; masks live in the callback's state, so a checkpoint's `state_dict` loads
    strictly into the plain module. A checkpoint without this callback's state is refused: a pruned run never goes on
    densely unnoticed.

    Args:
        select: Which parameters are prunable; None for none.
        samples: Which samples the scores see.
        name: Tells several pruning callbacks of one class apart, in checkpoints too.

    Attributes:
        masks: The masks in force; None before they are made.
        pruning_seconds: Time spent on making them.
        unit_scores: The scores of whole units, by layer, where those are pruned at the start of this fit; else None.
        keep_scores: What is called with the scores that the masks came from, and where those came from, as soon as they
            are there: nothing else keeps them. None: nobody wants them.

    Raises:
        PruneError: If `select` or `samples` is of another type.
    """

    def __init__(self, select: Select | None, samples: Samples, name: str | None = None) -> None:
        if select is not None:
            check_type("select", select, Select, "for example pl_prune.Select(exclude=['head'])")
        check_type("samples", samples, Samples, "for example pl_prune.Samples(per_class=10)")
        super().__init__(name)
        self.select = select
        self.samples = samples
        self.unit_scores: GroupScores | None = None
        self.keep_scores: Callable[[Scores, dict[str, Any]], None] | None = None
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
    def units(self) -> tuple[ParameterGroups, MaskSet] | None:
        """The groups of the network and which of their units are left, where whole units are pruned; else None."""
        return None

    @property
    def settings(self) -> str:
        """The method, what it prunes and what it scores on: what a resume must not change."""
        samples = replace(self.samples, batch_size=Samples().batch_size)
        return f"{self.method}, {describe(self.select)}, {describe(samples)}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be pruned honestly, before any work.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
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
        self._bridge.hashing = self.keep_scores is not None
        self._refuse_overlap(trainer, pl_module, self.select)
        self._check_resumed(trainer)
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
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove every hook.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        self._detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_enforcement": None, "_bridge": None, "keep_scores": None}

    def _hand_over(self, bridge: Bridge, scores: Scores, criterion: Criterion, **about: Any) -> None:
        """Give the scores of a criterion to whoever wants them; nothing here keeps them."""
        if self.keep_scores is None:
            return
        weights = {plain(name): p for name, p in bridge.pl_module.named_parameters()}
        origin = {
            "method": self.method,
            "criterion": criterion,
            "rounds": criterion.rounds,
            "layerwise_only": criterion.layerwise_only,
            "select": self.select,
            "samples": self.samples,
            "source": bridge.source,
            "data": bridge.data,
            "weights": hash_tensors(weights),
            "parameters": sum(p.numel() for p in weights.values()),
        }
        self.keep_scores(scores, {**origin, **about})

    def _put_in_force(self, bridge: Bridge, masks: MaskSet, fresh: bool) -> None:
        """Enforce masks from now on; `fresh` where averages start anew from the weights as they are."""
        trainer, pl_module = bridge.trainer, bridge.pl_module
        live = dict(pl_module.named_parameters())
        names = {plain(name): name for name in live}
        masks = renamed(masks, lambda name: names.get(plain(name), name))
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
