"""Criteria from the diagonal of the empirical Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from pl_prune.core.criterion import Criterion
from pl_prune.core.probe import Probe
from pl_prune.core.types import Scores

TaylorSign = Literal["paper", "removal"]


def taylor(weight: Tensor, grad: Tensor, curvature: Tensor, sign: TaylorSign) -> Tensor:
    """Estimate by how much the loss changes when a weight is removed, to second order, in absolute value.

    Args:
        weight: w.
        grad: g, the gradient of the mean loss.
        curvature: h, an estimate of the Hessian's diagonal.
        sign: "removal" is the Taylor expansion at -w, |-w g + w^2 h / 2|; "paper" is |w g + w^2 h / 2|.

    Returns:
        A score for each entry.
    """
    first = weight * grad
    return ((first if sign == "paper" else -first) + weight.square() * curvature / 2).abs()


def _fisher(probe: Probe, per_sample: bool) -> Scores:
    return probe.squared_grads() if per_sample else probe.squared_batch_grads()


@dataclass(frozen=True)
class FisherDiagonal(Criterion):
    """Score every entry by F, the mean over samples of the squared gradient of each sample's loss (FD).

    Args:
        per_sample: False squares the mean gradient of each batch instead, as the published code does: with one batch,
            the ranking of `GradNorm`.

    Source:
        Gollini Navarrete et al. (What Scalable Second-Order Information Knows for Pruning at Initialization), FD.
        Divergence from
        their code: it squares batch gradients, which is the same for its default batch size of 1 alone.
    """

    per_sample: bool = True
    curvature: ClassVar[str] = "Fisher diagonal"

    @property
    def cost(self) -> str:
        """One pass whose gradients are squared for each sample."""
        return "1 per-sample pass"

    def __call__(self, probe: Probe) -> Scores:
        """Return the diagonal of the empirical Fisher matrix.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        return _fisher(probe, self.per_sample)


@dataclass(frozen=True)
class FisherPruning(Criterion):
    """Score every entry by w^2 F / 2, with F as in `FisherDiagonal` (FP).

    Args:
        per_sample: As in `FisherDiagonal`; False with one batch is the ranking of `SNIP`.

    Source:
        Gollini Navarrete et al., FP; Theis et al., Faster gaze prediction with dense networks and Fisher pruning.
        Divergences as in `FisherDiagonal`.
    """

    per_sample: bool = True
    curvature: ClassVar[str] = "Fisher diagonal"

    @property
    def cost(self) -> str:
        """As in `FisherDiagonal`."""
        return "1 per-sample pass"

    def __call__(self, probe: Probe) -> Scores:
        """Weigh the Fisher diagonal by squared weights.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        fisher = _fisher(probe, self.per_sample)
        return {name: w.square() * fisher[name] / 2 for name, w in probe.weights().items()}


@dataclass(frozen=True)
class FisherTaylor(Criterion):
    """Score every entry by |w g + w^2 F / 2|, with F as in `FisherDiagonal` (FTS).

    Args:
        taylor_sign: "paper" as written there; "removal" for |-w g + w^2 F / 2|, the expansion of the loss at the
            removed weight.
        per_sample: As in `FisherDiagonal`.

    Source:
        Gollini Navarrete et al., FTS, equations 14, 16 and 17, where removing a weight (a step of -w) is given the
        first-order term +w g; the expansion's own sign is
        `taylor_sign="removal"`. Their code forgets the square of F when its batch size exceeds 4096. Other
        divergences as in `FisherDiagonal`.
    """

    taylor_sign: TaylorSign = "paper"
    per_sample: bool = True
    curvature: ClassVar[str] = "Fisher diagonal"

    @property
    def cost(self) -> str:
        """As in `FisherDiagonal`, and the gradient of the mean."""
        return "1 per-sample pass, 1 pass"

    def __call__(self, probe: Probe) -> Scores:
        """Add the first and the second order.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        fisher, grads = _fisher(probe, self.per_sample), probe.grads()
        return {name: taylor(w, grads[name], fisher[name], self.taylor_sign) for name, w in probe.weights().items()}
