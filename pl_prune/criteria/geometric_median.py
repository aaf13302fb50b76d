"""Distance of filters from one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pl_prune.core.group_criterion import GroupCriterion, out_names
from pl_prune.core.groups import Group, GroupScores, ParameterGroups
from pl_prune.core.probe import Probe
from pl_prune.core.types import Scores


@dataclass(frozen=True)
class GeometricMedian(GroupCriterion):
    """Score a unit by the sum of its distances from the other units of its group: the most replaceable go first (FPGM).

    Scores of layers of other widths are of other sizes: use `Layerwise` allocation.

    Source:
        He et al., Filter pruning via geometric median, equation 4. Divergences: a unit of several layers is the vector of
        all its weights; no share of the units is pruned by norm beside it.
    """

    needs_data: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False

    def __call__(self, probe: Probe, groups: ParameterGroups) -> GroupScores:
        """Measure distances between the weights of units.

        Args:
            probe: The parameters.
            groups: The groups.

        Returns:
            (size,) by root.
        """
        weights = {name: w for name, w in probe.weights().items() if name in set(out_names(groups, "weights"))}
        return {group.root: _distances(group, weights) for group in groups}


def _distances(group: Group, weights: Scores) -> torch.Tensor:
    vectors = torch.cat(
        [
            weights[m.name].movedim(m.dim, 0)[m.index.to(weights[m.name].device)].flatten(1)
            for m in group.members
            if m.kind == "out" and m.name in weights
        ],
        1,
    )
    # the product form loses the small differences that decide
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
