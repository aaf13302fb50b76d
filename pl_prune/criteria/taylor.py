"""First-order Taylor expansion of the loss, by unit."""

# Annotations are evaluated here, since the command line cannot resolve those of a nested criterion by name.

from dataclasses import dataclass
from typing import Literal

from pl_prune.core.group_criterion import GroupCriterion, Members, narrowed, out_names
from pl_prune.core.groups import GroupScores, ParameterGroups
from pl_prune.core.probe import Probe


@dataclass(frozen=True)
class Taylor(GroupCriterion):
    """Score a unit by the first-order change of the loss when it is zeroed: |sum of w * g|, or the sum of |w * g|.

    Args:
        order: Whether entries are summed before the absolute value is taken, so that they may cancel, or after it.
        members: Which parameters are summed over: weights of layers alone, or biases and norms too.

    Source:
        Molchanov et al., Importance estimation for neural network pruning, equation 8. Divergence: the mean
        gradient of all samples, where they square the contribution of each batch and average that.
    """

    order: Literal["sum_then_abs", "abs_then_sum"] = "sum_then_abs"
    members: Members = "weights"

    def __call__(self, probe: Probe, groups: ParameterGroups) -> GroupScores:
        """Multiply the gradient of the mean loss by the weights, and sum.

        Args:
            probe: The model, its parameters and its data.
            groups: The groups.

        Returns:
            (size,) by root.
        """
        probe = narrowed(probe, out_names(groups, self.members))
        change = {name: grad * probe.params[name].detach() for name, grad in probe.grads().items()}
        if self.order == "abs_then_sum":
            return groups.reduce({name: value.abs_() for name, value in change.items()})
        return {root: total.abs() for root, total in groups.reduce(change).items()}
