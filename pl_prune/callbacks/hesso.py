"""`HESSO`: train and prune in one run."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from pl_prune.callbacks.around_steps import AroundSteps
from pl_prune.callbacks.horizon import steps_left
from pl_prune.core.types import (
    Params,
    PruneError,
    check_choice,
    check_count,
    check_sparsity,
    check_type,
    describe,
)
from pl_prune.optim.attach_hesso import the_target
from pl_prune.optim.cric import CRIC
from pl_prune.optim.hesso import Hesso
from pl_prune.optim.pace import Budget, Pace
from pl_prune.optim.saliency import Saliency
from pl_prune.optim.units import Units


class HESSO(AroundSteps):
    """Turn the module's own optimizer into HESSO: whole units shrink to zero while the others train, in one run.

    After `start`, units are chosen by their saliency in `periods` turns; those chosen shrink linearly to exactly zero by the
    end of their period, and stay zero. The count is exact. Nothing else about training changes: optimizer, schedule,
    accumulation, precision and loss are the module's. At the end the smaller network is written to a file; the module itself
    stays whole, with zeros.

    Args:
        target_group_sparsity: Fraction of the units (channels, heads, hidden units) to remove. Give this one, or
        target_params: Fraction of the whole network's parameters to remove, counted after slicing, or
        target_macs: Fraction of its multiply-accumulates to remove.
        start: Training before the first choice.
        duration: Training until the last unit is zero.
        unit: Of what start and duration are: "fraction" of the fit's optimizer steps, or "steps".
        periods: In how many periods units go.
        saliency: How units are scored.
        projection: "progressive", or "one_shot": all units are chosen and zeroed at one step, the first after `start`.
        cric: How units are looked at again before they go, all in one period; None: they are not.
        min_keep: Units that every group keeps.
        include: Shell patterns of layers; only their groups are pruned.
        exclude: Shell patterns of layers that stay whole.
        shrink_at_end: Write the smaller network to `small.safetensors` in the run's folder.
        name: Tells several callbacks of this class apart.

    Attributes:
        groups: The groups that are pruned; None before they are traced.
        hesso: What works around the optimizer's steps, within a fit.

    Raises:
        PruneError: If an argument is not of its kind.

    Source:
        HESSO, algorithms 1 to 3, table 12 (defaults), table 6 (`projection="one_shot"` is its standard training). See `Saliency`,
        `CRIC` and `pl_prune.optim.hesso.Hesso` for divergences.
    """

    def __init__(
        self,
        target_group_sparsity: float | None = None,
        target_params: float | None = None,
        target_macs: float | None = None,
        start: float = 0.1,
        duration: float = 0.1,
        unit: Literal["fraction", "steps"] = "fraction",
        periods: int = 10,
        saliency: Saliency = Saliency(),
        projection: Literal["progressive", "one_shot"] = "progressive",
        cric: CRIC | None = None,
        min_keep: int = 1,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        shrink_at_end: bool = True,
        name: str | None = None,
    ) -> None:
        for key, patterns in {"include": include, "exclude": exclude}.items():
            if patterns is not None:
                check_type(key, patterns, list, f"for example {key}=['network.layer1.*']")
        super().__init__(include, exclude, shrink_at_end, name)
        self.target, self.sparsity = the_target(target_group_sparsity, target_params, target_macs)
        check_sparsity(self.sparsity, self.target)
        check_choice("unit", unit, ("fraction", "steps"))
        check_choice("projection", projection, ("progressive", "one_shot"))
        check_count("periods", periods)
        check_count("min_keep", min_keep)
        check_type("saliency", saliency, Saliency, "for example pl_prune.Saliency('taylor1')")
        if cric is not None:
            check_type("cric", cric, CRIC, "for example pl_prune.CRIC()")
        _check_span(start, duration, unit)
        self.start, self.duration, self.unit, self.periods = start, duration, unit, periods
        self.saliency, self.projection, self.cric, self.min_keep = saliency, projection, cric, min_keep

    @property
    def method(self) -> str:
        """Target, schedule and saliency."""
        span = f"{self.start} and {self.duration} {'of the fit' if self.unit == 'fraction' else 'steps'}"
        turns = "one shot" if self.projection == "one_shot" else f"{1 if self.cric else self.periods} periods"
        fields = {"min_keep": 1, "include": None, "exclude": None}
        more = [f", {k}={getattr(self, k)!r}" for k, default in fields.items() if getattr(self, k) != default]
        again = f", {describe(self.cric)}" if self.cric else ""
        target = f"sparsity {self.sparsity} of {self.target}"
        return f"HESSO at {target}, {describe(self.saliency)}, {span}, {turns}{again}{''.join(more)}"

    @property
    def settings(self) -> str:
        """What a resume must not change."""
        return self.method

    def make_hesso(self, trainer: Trainer, pl_module: LightningModule, params: Params) -> Hesso:
        """Work out the budget and the schedule.

        Args:
            trainer: The trainer.
            pl_module: The module.
            params: Its parameters by name.

        Returns:
            What works around the steps.

        Raises:
            PruneError: If the target or the schedule cannot be met, or CRIC meets manual optimization.
        """
        assert self.groups is not None
        if self.cric and not pl_module.automatic_optimization:
            raise PruneError(
                f"Expected automatic optimization with CRIC; found that {type(pl_module).__name__} optimizes manually. Leave CRIC out."
            )
        budget = Budget(Units(self.groups, params), self.sparsity, self.target, self.min_keep)
        saliency = replace(self.saliency, seed=self._seed) if self.saliency.seed is None else self.saliency
        pace = self._pace(trainer) if self._kept is None else Pace(0, (1,))  # that of the state
        return Hesso(params, trainer.optimizers, budget, pace, saliency, self.cric)

    def _pace(self, trainer: Trainer) -> Pace:
        if trainer.fast_dev_run or trainer.max_steps == 0:  # which come to no step at all, or to few
            return Pace(0, (1,))
        one = self.projection == "one_shot"
        periods = 1 if one or self.cric else self.periods
        if self.unit == "steps":
            pace = Pace.of(int(self.start), int(self.duration), periods)
        else:
            left = steps_left(trainer)
            pace = Pace.fractions(self.start, self.duration, periods, left)
        return Pace(pace.start, (1,)) if one else pace


def _check_span(start: float, duration: float, unit: str) -> None:
    """Raise unless a schedule is one."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (start, duration))
    fits = numbers and start >= 0 and duration > 0
    if fits and unit == "fraction":
        fits = start + duration <= 1
    elif fits:
        fits = float(start).is_integer() and float(duration).is_integer()
    if not fits:
        what = "fractions of the fit, 1 together at most" if unit == "fraction" else "whole numbers of steps"
        raise PruneError(
            f"Expected start of 0 or more and duration above 0, {what}; found start={start!r} and duration={duration!r} with "
            f"unit={unit!r}. Write unit='steps' for steps, or 'fraction' for fractions."
        )
