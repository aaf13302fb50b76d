"""`Pace` and `Budget`: when units go, how many of them, and which."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import inf

import torch
from torch import Tensor

from pl_prune.core.group_budget import Target
from pl_prune.core.types import PruneError, check_count, check_sparsity, prune_count
from pl_prune.optim.units import Units


def split(total: int, parts: int) -> list[int]:
    """Part a number into whole numbers that differ by one at most.

    Args:
        total: The number.
        parts: How many.

    Returns:
        `parts` numbers whose sum is `total`.

    >>> split(10, 4)
    [2, 3, 2, 3]
    """
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


@dataclass(frozen=True)
class Pace:
    """Optimizer steps before the first unit is chosen, and the steps of every period.

    Args:
        start: Steps of ordinary training at first.
        lengths: Steps in which the units of a period shrink to zero, by period.
    """

    start: int
    lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        """Steps until the last unit is zero."""
        return self.start + sum(self.lengths)

    @classmethod
    def of(cls, start: int, duration: int, periods: int) -> Pace:
        """Part a duration evenly.

        Args:
            start: Steps of ordinary training at first.
            duration: Steps of all periods together.
            periods: How many.

        Returns:
            The pace.

        Raises:
            PruneError: If there are fewer steps than periods, or a number is not whole.
        """
        check_count("periods", periods)
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise PruneError(
                f"Expected start to be a whole number of steps, 0 or more; found {start!r}. Give whole steps."
            )
        check_count("duration", duration)
        if duration < periods:
            raise PruneError(
                f"Expected at least one optimizer step in each of {periods} periods; found {duration} in all. "
                "Lengthen the duration (or the fit), or lower periods."
            )
        return cls(start, tuple(split(duration, periods)))

    @classmethod
    def fractions(cls, start: float, duration: float, periods: int, total: float) -> Pace:
        """Part a fraction of a training run evenly.

        Args:
            start: Fraction of its steps before pruning.
            duration: Fraction of them in which units shrink.
            periods: How many periods.
            total: Steps of the run.

        Returns:
            The pace.

        Raises:
            PruneError: If the length of the run is not known, or too short.
        """
        if total == inf:
            raise PruneError(
                "Expected a training run of known length, to take fractions of it; found one without (no max_epochs or max_steps, a "
                "loader without length). Set max_steps, or unit='steps' with start and duration in steps."
            )
        first, last = (int(Fraction(str(float(f))) * int(total) + Fraction(1, 2)) for f in (start, start + duration))
        return cls.of(first, max(last - first, 1), periods)


class Budget:
    """How many units go by the end of each period, and which ones may.

    Args:
        units: The units.
        sparsity: Fraction to remove, in [0, 1).
        target: Of what: "groups" counts units, "params" and "macs" what the whole network has left after slicing.
        min_keep: Units that every group keeps; a smaller group keeps all.

    Raises:
        PruneError: If so much cannot go.
    """

    def __init__(self, units: Units, sparsity: float, target: Target, min_keep: int) -> None:
        check_sparsity(sparsity, target)
        check_count("min_keep", min_keep)
        self.units, self.target, self.min_keep = units, target, min_keep
        sizes = units.groups.sizes.values()
        everything = self._left(torch.zeros(units.size, dtype=torch.bool))
        self.removal = prune_count(sparsity, everything)
        most = torch.cat([torch.arange(n) < n - min_keep for n in sizes]) if sizes else torch.zeros(0, dtype=torch.bool)
        if self.removal > (reach := everything - self._left(most)):
            raise PruneError(
                f"Expected to remove {sparsity:.4g} of the {target} ({self.removal:,}); found that at most {reach:,} of {everything:,} "
                f"can go with min_keep={min_keep} in each of {len(sizes)} groups. Lower the target, or let more layers be pruned "
                "(`include`, `exclude`)."
            )
        self._everything = everything

    def lowest(self, scores: Tensor, gone: Tensor, period: int, periods: int) -> Tensor:
        """Choose the units that go next: as few of the lowest as the budget of the period asks for.

        Args:
            scores: (size,), on the CPU.
            gone: Which units are gone already, (size,) of bool.
            period: The number of the period.
            periods: How many there are.

        Returns:
            Numbers of units, ascending by score, ties by number.
        """
        candidates = self._candidates(scores, gone)
        removal = self.removal * (period + 1) // periods
        if self.target == "groups":
            return candidates[: max(0, removal - int(gone.sum()))]
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            if self._left(gone.index_fill(0, candidates[:middle], True)) <= self._everything - removal:
                high = middle
            else:
                low = middle + 1
        return candidates[:low]

    def _candidates(self, scores: Tensor, gone: Tensor) -> Tensor:
        """Return the units that may go, ascending by score: in each group, all but the highest `min_keep` of those left."""
        here = (~gone).nonzero()[:, 0]
        order = here[scores[here].argsort(stable=True)]
        layer = self.units.layer[order]
        count = torch.bincount(layer, minlength=len(self.units.groups))
        by_layer = layer.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[by_layer] = torch.arange(len(order)) - (count.cumsum(0) - count)[layer[by_layer]]
        return order[rank < count[layer] - self.min_keep]

    def _left(self, gone: Tensor) -> int:
        if self.target == "groups":
            return int((~gone).sum())
        return self.units.groups.cost(self.units.by_root(~gone))[("params", "macs").index(self.target)]
