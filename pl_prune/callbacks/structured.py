"""`StructuredPruning`: remove channels, heads and hidden units before training, for real or by masks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pl_prune.callbacks import cutting
from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.bn_warmup import When, check_warmup, warm_up
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.group_bridge import GroupBridge, what_is_left
from pl_prune.callbacks.refusals import of_tuner
from pl_prune.core.allocate import Allocation, Global
from pl_prune.core.group_budget import Target, check_budget, select_units
from pl_prune.core.group_criterion import GroupCriterion
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.score_groups import check_group_criterion
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError, check_count, describe
from pl_prune.criteria.projective import PROscore
from pl_prune.structure.cut import Cuts, plan


class StructuredPruning(PruningCallback):
    """Remove whole units of a network before its first training step, and train the smaller network.

    With `shrink`, units are sliced off the module itself in `setup`, before optimizers and DDP are built on it: every step is
    faster, and checkpoints hold the small weights. A fit, validation or test that loads such a checkpoint into the whole
    module under this callback cuts the module first. Without `shrink`, units are masked from the start of the fit on and
    stay zero; `plp.shrink(module, callback.masks, inputs)` slices them off afterwards.

    Args:
        criterion: How to score units.
        sparsity: Fraction to remove, in [0, 1).
        target: Of what: "groups" counts units, "params" and "macs" what the whole network has left after slicing.
        allocation: Where the kept units go; at least one unit of each group stays.
        round_to: Units left in a group are a multiple of this (rounded up); 8 suits GPUs.
        ratios: Fractions of the units to remove by shell pattern on layer names, for layers that are to lose a fixed
            share; the budget is met by the others.
        include: Shell patterns of layers; only their groups are pruned.
        exclude: Shell patterns of layers that stay whole.
        exact: Whether only units go whose removal changes no output once they are zero; False adds the residual stream of
            transformers.
        shrink: Slice units off before training, or mask them.
        rounds: Score and remove in as many rounds, all before training: each scores the network without the units that the
            rounds before it removed, and keeps (1 - sparsity)^(1 / rounds) of what they left; the last one meets the budget.
        samples: Which samples the scores see, for criteria that need data.
        bn_warmup: Whether batch-norm statistics are set to those of the data before scoring: "auto" does so when the
            criterion needs the loss and no batch norm has seen a batch yet.
        warmup_batches: Batches of the loader's own size that the warm-up reads.
        name: Tells several callbacks of this class apart.

    Attributes:
        groups: The groups of the whole network; None before they are traced.
        masks: Masks over parameters; empty where units are sliced off.
        unit_scores: The last score that each unit got, by layer; None before units are scored here.

    Raises:
        PruneError: If the sparsity is outside [0, 1), or another argument is not of its kind.
    """

    def __init__(
        self,
        criterion: GroupCriterion = PROscore(),
        sparsity: float = 0.5,
        target: Target = "groups",
        allocation: Allocation = Global(min_per_layer=1),
        round_to: int | None = None,
        ratios: dict[str, float] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        exact: bool = True,
        shrink: bool = True,
        rounds: int = 1,
        samples: Samples = Samples(),
        bn_warmup: When = "auto",
        warmup_batches: int = 20,
        name: str | None = None,
    ) -> None:
        super().__init__(None if shrink else Select(output_layer=True), samples, name)
        check_group_criterion(criterion)
        check_budget(sparsity, target, allocation, round_to, ratios)
        check_count("rounds", rounds)
        check_warmup(bn_warmup, warmup_batches)
        if not exact and not shrink:
            raise PruneError(
                "Expected shrink=True with exact=False; found shrink=False. Zeros in their place are not what a network without these "
                "units computes: set shrink=True, or leave out exact."
            )
        self.criterion = criterion
        self.sparsity = sparsity
        self.target: Target = target
        self.allocation = allocation
        self.round_to = round_to
        self.ratios = ratios
        self.include = include
        self.exclude = exclude
        self.exact = exact
        self.shrink = shrink
        self.rounds = rounds
        self.bn_warmup: When = bn_warmup
        self.warmup_batches = warmup_batches
        self.groups: ParameterGroups | None = None
        self._cuts: Cuts | None = None
        self._cut: cutting.CutModule | None = None  # until the fit starts
        self._hook: RemovableHandle | None = None

    @property
    def method(self) -> str:
        """Criterion, budget and allocation."""
        fields = ("round_to", "ratios", "include", "exclude")
        more = [f", {field}={value!r}" for field in fields if (value := getattr(self, field)) is not None]
        kind = f" in {self.rounds} rounds" if self.rounds > 1 else ""
        kind += ("" if self.exact else ", not exact") + (", sliced off" if self.shrink else ", masked")
        budget = f"sparsity {self.sparsity} of {self.target}, {describe(self.allocation)}"
        return f"{describe(self.criterion)} at {budget}{''.join(more)}{kind}"

    @property
    def settings(self) -> str:
        """What a resume must not change."""
        return f"{self.method}, {describe(self.samples)}"

    @property
    def units(self) -> tuple[ParameterGroups, MaskSet] | None:
        """The groups of the whole network, and which of their units are left."""
        if self.groups is None or self.masks is None:
            return None
        cuts = self._cuts
        return self.groups, self.groups.collapse(self.masks) if cuts is None else cutting.kept_units(self.groups, cuts)

    def progress(self) -> dict[str, Any]:
        """Return the groups, and what was sliced off.

        Returns:
            Tensors and plain containers only.
        """
        state: dict[str, Any] = {} if self.groups is None else {"groups": self.groups.state_dict()}
        return state if self._cuts is None else {**state, "cuts": self._cuts.to_plain()}

    def resume(self, state: dict[str, Any]) -> None:
        """Take the groups.

        Args:
            state: The whole state of this callback.
        """
        self.groups = ParameterGroups.from_state_dict(state["groups"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Slice units off the module, if this is a fit, or as soon as a checkpoint says which.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.

        Raises:
            PruneError: If the module cannot be cut here, or its units cannot be scored.
        """
        super().setup(trainer, pl_module, stage)
        if not self.shrink:
            return
        self._hook = pl_module.register_load_state_dict_pre_hook(lambda *_: self._follow(trainer, pl_module))
        same = self._model is not None and self._model() is pl_module
        if stage == "fit" and not (same and self._cuts is not None):
            cutting.refuse_cut(trainer, pl_module, self)
            self._make_cut(GroupBridge(trainer, pl_module, Select(), self.samples))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put masks in force, or see that the cut module is what is trained.

        Args:
            trainer: The trainer.
            pl_module: The module, on its device, with its weights loaded and its optimizers built.
        """
        super().on_fit_start(trainer, pl_module)
        if not self.shrink:
            return
        self._check_resumed(trainer)
        if self._cut is not None:
            self._cut.check_names(pl_module)
        assert self._cuts is not None
        cutting.slice_states(trainer.optimizers, pl_module, self._cuts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the optimizers step what was cut; from here on the module stays cut.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._cuts is not None:
            cutting.check_optimized(trainer.optimizers, pl_module, self._cuts)
            self._forget()

    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Score units and mask those that go.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            The same masks on every rank.
        """
        bridge = GroupBridge(bridge.trainer, bridge.pl_module, bridge.select, bridge.samples)
        with bridge.undone_on_error(weights=False):
            groups, keep = self._choose(bridge)
        return groups.expand(keep).to(bridge.pl_module.device)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make the module whole again if training has not begun.

        Args:
            trainer: The trainer.
            pl_module: The module.
            exception: What was raised.
        """
        if self._cut is not None:
            self._cut.undo()
            self._cuts = self._model = None
        self._forget()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove every hook.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        self._forget()
        super().teardown(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cut": None, "_hook": None}

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._cut = None

    def _choose(self, bridge: GroupBridge) -> tuple[ParameterGroups, MaskSet]:
        """Trace, score and select."""
        prepared = warm_up(bridge, self.bn_warmup, self.warmup_batches, self.criterion.needs_loss)
        groups = self.groups = bridge.trace(self.include, self.exclude, self.exact)
        select = partial(
            select_units, groups=groups, target=self.target, allocation=self.allocation, round_to=self.round_to
        )
        keep, self.unit_scores = bridge.prune_units(
            self.criterion, groups, select, self.rounds, self.sparsity, self.ratios
        )
        rank_zero_info(
            f"{self.state_key}: {self.method}, {prepared}scored on {bridge.source}: {what_is_left(groups, keep)}."
        )
        return groups, keep

    def _make_cut(self, bridge: GroupBridge) -> None:
        start, pl_module = perf_counter(), bridge.pl_module
        bridge.settle()
        before = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        with bridge.undone_on_error(weights=False):
            groups, keep = self._choose(bridge)
            self._apply(pl_module, plan(pl_module, groups, keep), before)
        self.pruning_seconds = perf_counter() - start

    def _apply(self, pl_module: LightningModule, cuts: Cuts, before: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self._cut = cutting.CutModule(pl_module, cuts, before)
        self._cuts, self.masks = cuts, MaskSet({})
        self._model = weakref.ref(pl_module)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the module as that of the checkpoint that is about to be loaded."""
        saved = cutting.saved_cuts(trainer, self.state_key)
        if saved is None:
            if self._stage == "fit" and not of_tuner(trainer):
                self._check_resumed(trainer)
            return
        groups, cuts = saved
        here = self._model() if self._model is not None else None
        if here is pl_module and self._cuts == cuts:
            return
        if self._cut is not None:
            self._cut.undo()
        elif here is pl_module and self._cuts is not None:
            cutting.refuse_foreign(trainer, self.state_key)
        cutting.check_whole(trainer, pl_module, groups)
        self._apply(pl_module, cuts)
        self.unit_scores = None
