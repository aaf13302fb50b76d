"""Schedules: which sparsity holds after how many optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pl_prune.core.types import PruneError, check_count, check_sparsity


@dataclass(frozen=True)
class Schedule(ABC):
    """Say which sparsity holds at a step, and at which steps masks change."""

    @property
    @abstractmethod
    def last(self) -> int:
        """The step of the last change."""

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
        _check_start(self.start)

    @property
    def last(self) -> int:
        """The step of the only change."""
        return self.start

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


@dataclass(frozen=True)
class Gradual(Schedule):
    """Go from an initial to the final sparsity in equal numbers of steps, and reach it exactly at `end`.

    Args:
        final: Sparsity from `end` on, in [0, 1).
        start: Optimizer steps before the first change.
        end: Optimizer steps before the last change; more than `start`.
        every: Optimizer steps between changes; the last one comes at `end` in any case.
        initial: Sparsity at `start`, at most `final`.
    """

    final: float
    start: int = 0
    end: int = 1000
    every: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_sparsity(self.final)
        check_sparsity(self.initial)
        _check_start(self.start)
        check_count("schedule.every", self.every)
        if self.initial > self.final:
            raise PruneError(
                f"Expected an initial sparsity of at most the final one, {self.final}; found {self.initial}. "
                "Pruned weights do not come back: swap the two."
            )
        if isinstance(self.end, bool) or not isinstance(self.end, int) or self.end <= self.start:
            raise PruneError(
                f"Expected schedule.end to be a whole number of optimizer steps after its start, {self.start}; found {self.end!r}. "
                "Use OneShot to prune at once."
            )

    @property
    def last(self) -> int:
        """The step of the last change."""
        return self.end

    def sparsity(self, step: int) -> float:
        """Return the sparsity at a step, constant between two changes.

        Args:
            step: Optimizer steps done, from 0.

        Returns:
            Fraction of prunable entries, in [0, 1); 0 before `start`.
        """
        if step < self.start:
            return 0.0
        if step >= self.end:
            return self.final
        changed = step - (step - self.start) % self.every
        return self.between((changed - self.start) / (self.end - self.start))

    @abstractmethod
    def between(self, progress: float) -> float:
        """Return the sparsity on the way.

        Args:
            progress: Part of the way from `start` to `end`, in [0, 1).

        Returns:
            Sparsity between `initial` and `final`.
        """

    def due(self, step: int) -> bool:
        """Say whether masks change before this step.

        Args:
            step: Optimizer steps done, from 0.

        Returns:
            True at every `every`-th step from `start` on, and at `end`.
        """
        return step == self.end or (self.start <= step < self.end and (step - self.start) % self.every == 0)


@dataclass(frozen=True)
class Cubic(Gradual):
    """Prune fast at first and slowly at the end: final + (initial - final) (1 - progress)^3.

    Args:
        final: Sparsity from `end` on, in [0, 1).
        start: Optimizer steps before the first change.
        end: Optimizer steps before the last change; more than `start`.
        every: Optimizer steps between changes; the last one comes at `end` in any case.
        initial: Sparsity at `start`, at most `final`.

    Source:
        Zhu and Gupta, To prune, or not to prune, equation 1.

    >>> schedule = Cubic(final=0.8, start=0, end=100, every=50)
    >>> [round(schedule.sparsity(step), 3) for step in (0, 49, 50, 99, 100)]
    [0.0, 0.0, 0.7, 0.7, 0.8]
    """

    def between(self, progress: float) -> float:
        """Return the sparsity on the way.

        Args:
            progress: Part of the way, in [0, 1).

        Returns:
            Sparsity.
        """
        return self.final + (self.initial - self.final) * (1 - progress) ** 3


@dataclass(frozen=True)
class Linear(Gradual):
    """Prune the same number of entries at every change.

    Args:
        final: Sparsity from `end` on, in [0, 1).
        start: Optimizer steps before the first change.
        end: Optimizer steps before the last change; more than `start`.
        every: Optimizer steps between changes; the last one comes at `end` in any case.
        initial: Sparsity at `start`, at most `final`.

    >>> [round(Linear(final=0.8, end=100, every=25).sparsity(step), 3) for step in (0, 25, 50, 100)]
    [0.0, 0.2, 0.4, 0.8]
    """

    def between(self, progress: float) -> float:
        """Return the sparsity on the way.

        Args:
            progress: Part of the way, in [0, 1).

        Returns:
            Sparsity.
        """
        return self.initial + (self.final - self.initial) * progress


@dataclass(frozen=True)
class Exponential(Gradual):
    """Prune the same fraction of what is left at every change, as iterative magnitude pruning does.

    Args:
        final: Sparsity from `end` on, in [0, 1).
        start: Optimizer steps before the first change.
        end: Optimizer steps before the last change; more than `start`.
        every: Optimizer steps between changes; the last one comes at `end` in any case.
        initial: Sparsity at `start`, at most `final`.

    Source:
        Frankle and Carbin, The Lottery Ticket Hypothesis, section 1: each round prunes p^(1/n) of what survived the
        one before.

    >>> [round(Exponential(final=0.75, end=100, every=50).sparsity(step), 3) for step in (0, 50, 100)]
    [0.0, 0.5, 0.75]
    """

    def between(self, progress: float) -> float:
        """Return the sparsity on the way.

        Args:
            progress: Part of the way, in [0, 1).

        Returns:
            Sparsity.
        """
        return 1 - float((1 - self.initial) ** (1 - progress) * (1 - self.final) ** progress)


def _check_start(start: int) -> None:
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise PruneError(
            f"Expected schedule.start to be a whole number of optimizer steps, 0 or more; found {start!r}. Use 0 to prune before the first."
        )
