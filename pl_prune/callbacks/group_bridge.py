"""`GroupBridge`: what structured pruning needs, taken from a Trainer and its module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pl_prune.callbacks.bridge import Bridge
from pl_prune.core import sync
from pl_prune.core.group_criterion import GroupCriterion
from pl_prune.core.groups import GroupScores, ParameterGroups
from pl_prune.core.probe import Probe
from pl_prune.core.score_groups import producers, run_group_criterion
from pl_prune.core.types import PruneError
from pl_prune.structure.trace import trace_groups


class GroupBridge(Bridge):
    """A module, its groups, its scoring data and its loss."""

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

    def score(self, criterion: GroupCriterion, groups: ParameterGroups) -> GroupScores:
        """Score over all ranks, and leave no trace.

        Args:
            criterion: How to score.
            groups: The groups.

        Returns:
            (size,) by root, the same on every rank.
        """
        loader = self.find_loader()
        with self.quiet():
            sync.copy_of_rank_zero_(self.pl_module.buffers())  # as DDP does before each forward pass
            batches = self._scoring_batches(loader, criterion.needs_data, criterion.needs_loss)
            params = sync.agreed(lambda: producers(self.pl_module, groups))
            probe = Probe(self.pl_module, params, self.loss, batches, self._track)
            return sync.agreed(lambda: run_group_criterion(criterion, probe, groups))

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
