"""Magnitude of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pl_prune.core.criterion import Criterion
from pl_prune.core.probe import Probe
from pl_prune.core.types import Scores, score_dtype


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Score every entry by its absolute value |w|.

    Source:
        Han et al., Learning both Weights and Connections. No divergence.
    """

    needs_data: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    uses_gradients: ClassVar[bool] = False

    @property
    def cost(self) -> str:
        """Nothing is run."""
        return "no pass"

    def __call__(self, probe: Probe) -> Scores:
        """Take absolute values.

        Args:
            probe: The parameters.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        return {name: p.detach().abs().to(score_dtype(p)) for name, p in probe.params.items()}
