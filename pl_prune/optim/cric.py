"""`CRIC`: look at units that seem redundant again on their way to zero, before they are believed to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pl_prune.core import sync
from pl_prune.core.types import PruneError, check_choice, check_count
from pl_prune.optim.pace import Budget
from pl_prune.optim.saliency import Saliency, gather
from pl_prune.optim.units import Rows, Units


@dataclass(frozen=True)
class CRIC:
    """The corrective redundant identification cycle.

    Units of lowest saliency are taken to zero on trial, step by step, while the others take plain gradient steps; whatever
    is among the lowest on the way without having been taken along is taken in the next cycle. In the end the units of lowest
    mean saliency over all samples go, and the weights are those of before.

    Args:
        sampling_steps: Samples of the way to zero in each cycle: at norms 1, ..., 1/sampling_steps of those at first.
        tolerance: The last cycle is one that finds no more new units than this; None: that of the preset.
        max_cycles: The last cycle at the latest.
        preset: "corrected" tolerates 0 new units, "paper" 50.

    Raises:
        PruneError: If a number is not whole, or too small.

    Source:
        HESSO, algorithm 2, section 4.7. Divergences: line 10 is read as HESSO's own projection, unit by unit (as it is written,
        all units together get one norm); the historical set starts with the first units (as line 4, not as the text has
        it); tolerance 0 unless preset="paper"; "merge" is the mean over all samples.
    """

    sampling_steps: int = 10
    tolerance: int | None = None
    max_cycles: int = 10
    preset: Literal["corrected", "paper"] = "corrected"

    def __post_init__(self) -> None:
        check_count("cric.sampling_steps", self.sampling_steps)
        check_count("cric.max_cycles", self.max_cycles)
        check_choice("cric.preset", self.preset, ("corrected", "paper"))
        if self.tolerance is not None and (not isinstance(self.tolerance, int) or self.tolerance < 0):
            raise PruneError(
                f"Expected cric.tolerance to be a number of units, 0 or more; found {self.tolerance!r}. Leave it out for the preset's."
            )

    @property
    def tolerated(self) -> int:
        """New units that a last cycle may find."""
        return self.tolerance if self.tolerance is not None else 50 if self.preset == "paper" else 0

    def most_samples(self, units: int, redundant: int) -> int:
        """Bound the samples that are needed, whatever the scores.

        Args:
            units: Number of units.
            redundant: How many go.

        Returns:
            An upper bound: cycles find new units only, so there are at most 1 + floor((units - redundant) / (tolerance + 1)).
        """
        if redundant <= self.tolerated:
            return 1
        cycles = 1 + (units - redundant) // (self.tolerated + 1)
        return min(cycles, self.max_cycles) * self.sampling_steps


class Cycle:
    """The sets of CRIC: which units are being taken to zero, and how far.

    Args:
        config: The cycle's settings.
        lowest: Returns the numbers of the units that scores call redundant.
        size: Number of units.

    Attributes:
        violating: Units being taken to zero; None before the first sample.
        step: Samples of this cycle so far.
        cycles: Cycles that are over.
        finished: Whether the search is over.
    """

    def __init__(self, config: CRIC, lowest: Callable[[Tensor], Tensor], size: int) -> None:
        self._config, self._lowest = config, lowest
        self.violating: Tensor | None = None
        self._history = torch.zeros(size, dtype=torch.bool)
        self._new = torch.zeros(size, dtype=torch.bool)
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._samples = self.step = self.cycles = 0
        self.finished = False

    @property
    def fraction(self) -> float:
        """The norm that the next sample wants of a violating unit, as a fraction of that at first."""
        return (self._config.sampling_steps - self.step) / self._config.sampling_steps

    @property
    def scores(self) -> Tensor:
        """The mean saliency over all samples, (size,) of float64."""
        return self._sum / max(self._samples, 1)

    def observe(self, scores: Tensor) -> None:
        """Take the saliencies of one sample.

        Args:
            scores: (size,).
        """
        self._sum += scores
        self._samples += 1
        low = torch.zeros_like(self._new)
        low[self._lowest(scores)] = True
        if self.violating is None:
            self.violating, self._history = low, low.clone()
            if int(low.sum()) <= self._config.tolerated:
                self.finished = True
                return
        self._new |= low & ~self.violating
        self.step += 1
        if self.step < self._config.sampling_steps:
            return
        self.violating = self._new & ~self._history
        self._history |= self.violating
        self._new = torch.zeros_like(self._new)
        self.step = 0
        self.cycles += 1
        self.finished = int(self.violating.sum()) <= self._config.tolerated or self.cycles == self._config.max_cycles

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers."""
        kept = {k: v for k, v in vars(self).items() if k not in ("_config", "_lowest")}
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: It.
        """
        for key in set(vars(self)) - {"_config", "_lowest"}:
            setattr(self, key, state[key])


class Walk:
    """The way of a network's weights through the cycles: a point beside the weights, which stay as they are.

    Args:
        params: The weights that gradient steps move, by name.
        units: Their units.
        saliency: How a sample is scored.
        budget: Which units are the lowest.
        config: The cycle's settings.

    Attributes:
        point: Where the next sample is taken, by name.
        cycle: The sets.
    """

    def __init__(
        self, params: Mapping[str, Tensor], units: Units, saliency: Saliency, budget: Budget, config: CRIC
    ) -> None:
        self._params, self._units, self._saliency = params, units, saliency
        none = torch.zeros(units.size, dtype=torch.bool)
        self.cycle = Cycle(config, lambda scores: budget.lowest(scores, none, 0, 1), units.size)
        self.point = {name: p.detach().clone() for name, p in params.items()}
        self._norms = units.sums(params, params).sqrt()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and the point."""
        for name, point in self.point.items():
            weights = self._params[name].detach().clone()
            self._params[name].copy_(point)
            point.copy_(weights)

    @torch.no_grad()
    def sample(self, grads: Mapping[str, Tensor], rates: Mapping[str, float]) -> bool:
        """Score the units at the point, and move on.

        Args:
            grads: Gradients at the point by name; a missing one is zero.
            rates: Learning rates by name.

        Returns:
            Whether the sample counts; if gradients are not finite, it has to be taken again.
        """
        here = torch.ones(self._units.size, dtype=torch.bool)
        statistics = gather(self._units, self.point, grads)
        scores = sync.of_rank_zero(self._saliency.score(statistics, self._units.entries, here))
        if scores is None:
            return False
        self.cycle.observe(scores)
        if self.cycle.finished:
            return True
        for name, point in self.point.items():
            if self.cycle.step == 0:
                point.copy_(self._params[name])
            elif name in grads:
                point.sub_(grads[name].to(point.dtype), alpha=rates[name])
        if self.cycle.step and self.cycle.violating is not None:
            chosen = self.cycle.violating.nonzero()[:, 0]
            norms = self._norms[chosen.to(self._norms.device)]
            Rows(self._units, chosen).scale_to_(self.point, norms * self.cycle.fraction)
        return True

    def state_dict(self, inside: bool) -> dict[str, Any]:
        """Return tensors and plain containers.

        Args:
            inside: Whether weights and point are exchanged.

        Returns:
            What `load_state_dict` takes.
        """
        point = self._params if inside else self.point
        kept = {name: point[name].detach().clone() for name in self.point}
        return {"point": kept, "cycle": self.cycle.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned; the weights are those of the same moment.

        Args:
            state: It.
        """
        for name, point in self.point.items():
            point.copy_(state["point"][name])
        self.cycle.load_state_dict(state["cycle"])
