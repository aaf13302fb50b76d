"""Random scores: the baseline of every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pl_prune.core.criterion import Criterion
from pl_prune.core.probe import Probe
from pl_prune.core.seeds import generator_of
from pl_prune.core.types import Scores


@dataclass(frozen=True)
class Random(Criterion):
    """Score every entry by a uniform number in [0, 1).

    Drawn on the CPU from a generator of its own for every parameter, so that device, random state and initial weights have no
    influence: weights drawn under `torch.manual_seed(s)` are not those that `Random(seed=s)` prefers.

    Args:
        seed: Seed of the generators, together with the parameters' names.

    Source:
        The baseline of Gollini Navarrete et al. (What Scalable Second-Order Information Knows for Pruning at
        Initialization).
        Divergence: their code draws from the global random state.
    """

    seed: int = 0
    needs_data: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    uses_gradients: ClassVar[bool] = False

    @property
    def cost(self) -> str:
        """Nothing is run."""
        return "no pass"

    def __call__(self, probe: Probe) -> Scores:
        """Draw the scores.

        Args:
            probe: The parameters.

        Returns:
            Float32 scores.
        """
        return {
            name: torch.rand(p.shape, generator=generator_of(self.seed, name)).to(p.device)
            for name, p in probe.params.items()
        }
