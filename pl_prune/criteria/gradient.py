"""First-order criteria: gradient norm and connection sensitivity."""

from __future__ import annotations

from dataclasses import dataclass

from pl_prune.core.criterion import Criterion
from pl_prune.core.probe import Probe
from pl_prune.core.types import Scores


@dataclass(frozen=True)
class GradNorm(Criterion):
    """Score every entry by |g|, the absolute value of the gradient of the mean loss (GN).

    Source:
        Gollini Navarrete et al., section 3, where it is named without a formula. Divergence from their code: the mean
        is over
        samples, not over batches, so a short last batch has no larger weight.
    """

    def __call__(self, probe: Probe) -> Scores:
        """Take the absolute value after the mean.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        return {name: grad.abs() for name, grad in probe.grads().items()}


@dataclass(frozen=True)
class SNIP(Criterion):
    """Score every entry by |w * g|, its connection sensitivity.

    Equal to |dL/dc| for a mask c at c = 1, which is never materialised.

    Source:
        Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, equation 4. Divergences: scores
        are not divided by
        their sum (the ranking is the same); the network is scored in evaluation mode at its own initialisation, in
        one mean over
        class-balanced samples (the paper takes one training batch; some implementations re-initialise a copy).
    """

    def __call__(self, probe: Probe) -> Scores:
        """Multiply the gradient of the mean loss by the weights.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        return {name: (grad * probe.params[name].detach()).abs_() for name, grad in probe.grads().items()}
