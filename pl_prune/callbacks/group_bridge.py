"""`GroupBridge`: what structured pruning needs, taken from a Trainer and its module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.cutting import cut_for_now
from pl_prune.core import sync
from pl_prune.core.group_criterion import GroupCriterion
from pl_prune.core.group_rounds import prune_in_rounds, without
from pl_prune.core.groups import GroupScores, ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.probe import Probe
from pl_prune.core.score_groups import producers, run_group_criterion
from pl_prune.core.types import PruneError
from pl_prune.structure.cut import plan
from pl_prune.structure.trace import trace_groups


class GroupBridge(Bridge):
    """A module, its groups, its scoring data, read once, and its loss."""

    _batches: list[Any] | None = None

    def trace(self, include: list[str] | None, exclude: list[str] | None, exact: bool) -> ParameterGroups:
        """Trace the module's forward on its `example_input_array`, or on two samples of the scoring data.

        Args:
            include: Patterns of layers, as for `trace_groups`.
            exclude: Patterns of layers that stay whole.
            exact: Whether only units whose removal changes no output are wanted.

        Returns:
            The groups, the same on every rank.
        """
        self.find_loader()
        with self.quiet():
            inputs = self._inputs()
            return sync.agreed(lambda: trace_groups(self.pl_module, inputs, include, exclude, exact))

    def score(self, criterion: GroupCriterion, groups: ParameterGroups, keep: MaskSet | None = None) -> GroupScores:
        """Score over all ranks, and leave no trace.

        Args:
            criterion: How to score.
            groups: The groups.
            keep: Score the network without the other units, which are sliced off meanwhile; None: the whole one.

        Returns:
            A score of each unit that is scored, by root, the same on every rank.
        """
        loader = self.find_loader()
        with ExitStack() as stack:
            if keep is not None:
                stack.enter_context(cut_for_now(self.pl_module, plan(self.pl_module, groups, keep)))
                groups = without(groups, keep)
            stack.enter_context(self.quiet())
            sync.copy_of_rank_zero_(self.pl_module.buffers())  # as DDP does before each forward pass
            if self._batches is None:
                self._batches = self._scoring_batches(loader, criterion.needs_data, criterion.needs_loss)
            params = sync.agreed(lambda: producers(self.pl_module, groups))
            probe = Probe(self.pl_module, params, self.loss, self._batches, self._track)
            return sync.agreed(lambda: run_group_criterion(criterion, probe, groups))

    def prune_units(
        self,
        criterion: GroupCriterion,
        groups: ParameterGroups,
        select: Callable[..., MaskSet],
        rounds: int,
        sparsity: float,
        ratios: Mapping[str, float] | None,
    ) -> tuple[MaskSet, GroupScores]:
        """Score and select units over all ranks, in rounds, and leave no trace.

        Args:
            criterion: How to score.
            groups: The groups.
            select: `select_units` with all but scores, sparsity, ratios and what is left.
            rounds: In how many rounds.
            sparsity: Fraction to remove in the end.
            ratios: Fractions to remove of some layers in the end.

        Returns:
            The same masks over units on every rank, and the last score of each unit.
        """

        def agreed(scores: GroupScores, share: float, ratios: dict[str, float], keep: MaskSet | None) -> MaskSet:
            chosen = partial(select, scores, sparsity=share, ratios=ratios, within=keep)
            return sync.masks_of_rank_zero(chosen, self.pl_module.device).to("cpu")

        return prune_in_rounds(partial(self.score, criterion, groups), agreed, rounds, sparsity, ratios)

    def settle(self) -> None:
        """Do in `setup` what comes after it: put the module where it will be, with the tensors of rank 0."""
        self.find_loader()
        self.trainer.precision_plugin.convert_module(self.pl_module)
        self.pl_module.to(self.trainer.strategy.root_device)
        sync.copy_of_rank_zero_([*self.pl_module.parameters(), *self.pl_module.buffers()])

    def example_inputs(self) -> Any:
        """Return what the module's forward takes, to see how it runs.

        Returns:
            Its `example_input_array`, or two samples of the scoring data.
        """
        self.find_loader()
        with self.quiet():
            return self._inputs()

    def _inputs(self) -> Any:
        """Return what the module's forward takes."""
        example = self.pl_module.example_input_array
        if example is not None:
            return self._to_device(example)
        batch = self.example()
        if isinstance(batch, Mapping):
            known = inspect.signature(self.pl_module.forward).parameters
            batch = {key: value for key, value in batch.items() if key in known}
        elif isinstance(batch, Sequence) and not isinstance(batch, str):
            batch = batch[0]
        if isinstance(batch, Tensor) or (isinstance(batch, Mapping) and batch):
            return batch
        raise PruneError(
            f"Expected batches of (inputs, ...) or dicts that name arguments of {type(self.pl_module).__name__}.forward; found "
            f"{type(batch).__name__}. Set `self.example_input_array` on the module."
        )


def what_is_left(groups: ParameterGroups, keep: MaskSet) -> str:
    """Count units, parameters and MACs.

    Args:
        groups: The groups of the whole network.
        keep: Which units stay.

    Returns:
        The counts, in words.
    """
    (params, macs), (params_left, macs_left) = groups.cost({}), groups.cost(keep)
    kept, total = (sum(column) for column in zip(*keep.counts().values(), strict=True))
    return f"{kept:,} of {total:,} units kept, {params_left:,} of {params:,} parameters, {macs_left:,} of {macs:,} MACs"
