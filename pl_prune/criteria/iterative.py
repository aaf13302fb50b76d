"""Connection sensitivity in rounds: iterative SNIP and FORCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pl_prune.core.criterion import Criterion
from pl_prune.core.probe import Probe
from pl_prune.core.types import Scores, check_count
from pl_prune.criteria.gradient import SNIP


@dataclass(frozen=True)
class IterSNIP(Criterion):
    """Score every entry by |w * g| in the network as pruned so far, in rounds; what a round prunes stays pruned.

    Densities fall exponentially over the rounds. One round is `SNIP`.

    Args:
        rounds: How many times to score and prune.

    Source:
        de Jorge et al., Progressive Skeletonization: Trimming more fat from a network at initialization (Iterative
        SNIP). Divergences: pruned entries are out of the selection, where their code gives them the lowest
        score, so that ties can bring them back; the loss is the module's own, where their code applies the negative
        log-likelihood to raw logits; all rounds see the same samples, in evaluation mode.
    """

    rounds: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(f"{type(self).__name__}.rounds", self.rounds)

    @property
    def cost(self) -> str:
        """One pass in each round."""
        return f"{self.rounds} passes"

    def __call__(self, probe: Probe) -> Scores:
        """Score the network as it is masked now.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        return SNIP()(probe)


@dataclass(frozen=True)
class FORCE(IterSNIP):
    """Score every entry by |w * g| with its dense weight w and the gradient g in the network as pruned so far.

    The gradient is taken of pruned entries too, so that a later round may bring one back. Densities fall exponentially
    over the rounds. One round is `SNIP`.

    Args:
        rounds: How many times to score and prune.

    Source:
        de Jorge et al., Progressive Skeletonization: Trimming more fat from a network at initialization (FORCE).
        Divergences: the loss is the module's own, where their code applies the negative
        log-likelihood to raw logits; all rounds see the same samples, in evaluation mode.
    """

    can_return: ClassVar[bool] = True

    def __call__(self, probe: Probe) -> Scores:
        """Score the network as it is masked now, by its dense weights.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        return {name: (grad * probe.dense[name].detach()).abs_() for name, grad in probe.grads().items()}
