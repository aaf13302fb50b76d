"""`ByGroup`: any criterion of entries as one of groups."""

# Annotations are evaluated here, since the command line cannot resolve those of a nested criterion by name.

from dataclasses import dataclass

from pl_prune.core.criterion import Criterion
from pl_prune.core.group_criterion import GroupCriterion, Members, narrowed, out_names
from pl_prune.core.groups import GroupScores, ParameterGroups, Reduction
from pl_prune.core.probe import Probe
from pl_prune.core.score import run_criterion
from pl_prune.core.types import PruneError, check_type
from pl_prune.criteria.magnitude import Magnitude


@dataclass(frozen=True)
class ByGroup(GroupCriterion):
    """Reduce the scores of entries to one score per unit.

    Args:
        criterion: Scores the entries. Magnitude with "sum" is the L1 norm of a unit, with "l2" its L2 norm.
        reduce: "sum", "mean" over the entries of the unit, "max", or "l2" (root of the sum of squares).
        members: Which parameters are scored: weights of layers alone, or biases and norms too.

    Raises:
        PruneError: If the criterion has rounds, or orders the entries of a layer only.

    Source:
        Li et al., Pruning filters for efficient ConvNets, for the L1 norm of filters; Fang et al., DepGraph, for
        sums over coupled layers. Divergence: layers that consume a unit do not count, and nothing is normalised by
        layer.
    """

    criterion: Criterion = Magnitude()  # noqa: RUF009 - frozen
    reduce: Reduction = "sum"
    members: Members = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("criterion", self.criterion, Criterion, "for example pl_prune.Magnitude()")
        if self.criterion.rounds > 1 or self.criterion.layerwise_only:
            raise PruneError(
                f"Expected a criterion whose scores say something about single units; found {type(self.criterion).__name__}, which "
                "scores in rounds or orders the entries of a layer. Set rounds=1, or use Magnitude, SNIP or another."
            )

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """What the lifted criterion needs."""
        return self.criterion.needs_data

    @property
    def needs_loss(self) -> bool:  # type: ignore[override]
        """What the lifted criterion needs."""
        return self.criterion.needs_loss

    def __call__(self, probe: Probe, groups: ParameterGroups) -> GroupScores:
        """Score entries and reduce them.

        Args:
            probe: The model, its parameters and its data.
            groups: The groups.

        Returns:
            (size,) by root.
        """
        scores = run_criterion(self.criterion, narrowed(probe, out_names(groups, self.members)))
        return groups.reduce(scores, self.reduce)
