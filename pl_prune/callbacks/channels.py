"""`Channels`: scores of whole channels in the place of single weights."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer

from pl_prune.adversarial.scored_units import ScoredUnits
from pl_prune.adversarial.scores import ScoreLearner
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.group_bridge import GroupBridge
from pl_prune.callbacks.shrinking import write_small
from pl_prune.core.allocate import Global
from pl_prune.core.group_budget import Target, check_budget
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import Params, plain


@dataclass(frozen=True)
class Channels:
    """Learn one score for each channel, hidden unit or head of a network, so that it can be sliced.

    Args:
        target: What `sparsity` is a fraction of: "macs" or "params" of the whole network, as counted after slicing, or "groups", its units.
        include: Shell patterns of layers; only their units have scores.
        exclude: Shell patterns of layers that stay whole.
        shrink_at_end: Write the smaller network to `small.safetensors` in the run's folder.

    Raises:
        PruneError: If the target is none of these.
    """

    target: Target = "macs"
    include: list[str] | None = None
    exclude: list[str] | None = None
    shrink_at_end: bool = True

    def __post_init__(self) -> None:
        check_budget(0.0, self.target, Global(), None, None)

    def trace(self, bridge: Bridge) -> ParameterGroups:
        """Find the units.

        Args:
            bridge: The module and its data.

        Returns:
            Those whose removal changes no output, the same on every rank.
        """
        traced = GroupBridge(bridge.trainer, bridge.pl_module, bridge.select, bridge.samples)
        return traced.trace(self.include, self.exclude, exact=True)

    def begin(
        self, groups: ParameterGroups, params: Params, learner: ScoreLearner, sparsity: float, state: object = None
    ) -> ScoredUnits:
        """Begin to score units, or go on.

        Args:
            groups: The units.
            params: All parameters of the network by name (`plain`).
            learner: How scores begin.
            sparsity: Fraction to remove.
            state: What `state_dict` of the scores returned; None: begin.

        Returns:
            Their scores.
        """
        return ScoredUnits(params, groups, learner, sparsity, self.target, state)  # type: ignore[arg-type]

    def finish(self, scored: ScoredUnits, pl_module: LightningModule) -> MaskSet:
        """Zero the units that are out.

        Args:
            scored: The scores.
            pl_module: The module.

        Returns:
            The masks of all their slices, by live name.
        """
        live = {plain(name): (name, p) for name, p in pl_module.named_parameters()}
        masks = scored.settle({name: p for name, (_, p) in live.items()})
        return MaskSet({live[name][0]: mask for name, mask in masks.items()})

    def write(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet, groups: ParameterGroups) -> None:
        """Write the smaller network, if asked to.

        Args:
            trainer: The trainer, at the end of a fit.
            pl_module: The module.
            masks: The masks of the units that are out.
            groups: All units.
        """
        if self.shrink_at_end and not trainer.fast_dev_run:
            write_small(trainer, pl_module, masks, groups)
