"""Whole units that a network has left: channels, heads, hidden units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.report.cost import Cost

HEAD = ("layer", "units kept", "share")


@dataclass(frozen=True)
class Units:
    """What is left of units that leave together.

    Args:
        layers: Units kept and units in all, by the layer that produces them.
        cost: Of the whole network, and of what slicing leaves.
        sliced: Whether they have been sliced off; else they are masked.
    """

    layers: dict[str, tuple[int, int]]
    cost: Cost
    sliced: bool

    @classmethod
    def of(cls, groups: ParameterGroups, keep: MaskSet, sliced: bool) -> Units:
        """Count.

        Args:
            groups: The groups of the whole network.
            keep: Which of their units are left.
            sliced: Whether the others have been sliced off.

        Returns:
            The counts.
        """
        (params, macs), (params_kept, macs_kept) = groups.cost({}), groups.cost(keep)
        return cls(dict(keep.counts()), Cost(params, params_kept, macs, macs_kept), sliced)

    @property
    def removed(self) -> float:
        """Fraction of the network's parameters that have been sliced off; 0 where units are masked."""
        return 1 - self.cost.params_kept / max(self.cost.params, 1) if self.sliced else 0.0

    def text(self) -> str:
        """Say what is left in one line.

        Returns:
            Units, parameters and MACs.
        """
        kept, total = (sum(column) for column in zip(*self.layers.values(), strict=True))
        cost = self.cost
        return (
            f"{kept:,} of {total:,} kept, {'the others sliced off:' if self.sliced else 'the others masked; slicing them off leaves'} "
            f"{cost.params_kept:,} of {cost.params:,} parameters, {cost.macs_kept:,} of {cost.macs:,} MACs"
        )


def unit_rows(layers: Mapping[str, tuple[int, int]]) -> list[tuple[str, ...]]:
    """Write what is left of every layer's units.

    Args:
        layers: Units kept and units in all.

    Returns:
        Rows under `HEAD`.
    """
    return [(name, f"{kept:,} / {total:,}", f"{kept / max(total, 1):.2%}") for name, (kept, total) in layers.items()]
