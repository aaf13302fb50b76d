"""Schedules: which sparsity holds after how many optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pl_prune.core.types import PruneError, check_sparsity


@dataclass(frozen=True)
class Schedule(ABC):
    """Say which sparsity holds at a step, and at which steps masks change."""

    @abstractmethod
    def sparsity(self, step: int) -> float:
        """Return the sparsity in force.

        Args:
            step: Optimizer steps done, from 0.

        Returns:
            Fraction of prunable entries, in [0, 1).
        """

    @abstractmethod
    def due(self, step: int) -> bool:
        """Say whether masks change before this step.

        Args:
            step: Optimizer steps done, from 0.

        Returns:
            True where a new mask is to be made.
        """


@dataclass(frozen=True)
class OneShot(Schedule):
    """Go from dense to the final sparsity in one step.

    Args:
        final: Sparsity from `start` on, in [0, 1).
        start: Optimizer steps to train densely first.

    >>> schedule = OneShot(final=0.9, start=100)
    >>> schedule.sparsity(99), schedule.sparsity(100), schedule.due(100), schedule.due(101)
    (0.0, 0.9, True, False)
    """

    final: float
    start: int = 0

    def __post_init__(self) -> None:
        check_sparsity(self.final)
        if self.start < 0:
            raise PruneError(
                f"Expected a start of 0 or more optimizer steps; found {self.start}. Use 0 to prune before the first."
            )

    def sparsity(self, step: int) -> float:
        """Return 0 before `start` and `final` from there on.

        Args:
            step: Optimizer steps done, from 0.

        Returns:
            Fraction of prunable entries, in [0, 1).
        """
        return self.final if step >= self.start else 0.0

    def due(self, step: int) -> bool:
        """Say whether this is the step of the one change.

        Args:
            step: Optimizer steps done, from 0.

        Returns:
            True at `start` alone.
        """
        return step == self.start
