"""Criteria from accurate estimates of the Gauss-Newton matrix's diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pl_prune.core.batch import pick
from pl_prune.core.criterion import Criterion
from pl_prune.core.persample import squared_sums
from pl_prune.core.probe import Probe
from pl_prune.core.seeds import generator_of
from pl_prune.core.types import Scores, check_count, check_positive
from pl_prune.criteria.fisher import TaylorSign, taylor


@dataclass(frozen=True)
class GaussNewtonDiagonal(Criterion):
    """Score every entry by the diagonal of the generalised Gauss-Newton matrix of the cross-entropy.

    In a network of piecewise linear activations with batch norm in evaluation mode it is the exact diagonal of the
    Hessian, and never negative: what `HutchinsonDiagonal`
    estimates with much noise.

    Args:
        estimator: "gnb" draws labels from the model's own softmax and squares summed gradients. "sketch" does the same
            with random signs instead of labels. "exact" takes one per-sample pass for each class.
        probes: Into how many groups "gnb" and "sketch" deal the samples, each with a square of its own: one pass over
            the data at any number, and a relative error of about sqrt(2 / probes); as many as there are samples or
            more is the most accurate, by a per-sample pass.
        temperature: Divides the logits.
        seed: Seed of the probes, drawn on the CPU.

    Source:
        The label-sampling estimator is that of Liu et al. (Sophia), algorithm 2 (Gauss-Newton-Bartlett), with a
        mini-batch for each probe as there. Divergence: it is a mean over disjoint groups of the scoring samples of all
        ranks, not a running average over training. Not a method of Gollini Navarrete et al.: a better estimate of
        their HD is another method.
    """

    estimator: Literal["gnb", "sketch", "exact"] = "gnb"
    probes: int = 10
    temperature: float = 1.0
    seed: int = 0
    needs_logits: ClassVar[bool] = True
    curvature: ClassVar[str] = "Gauss-Newton diagonal"

    @property
    def cost(self) -> str:
        """One pass, each probe over samples of its own, or a per-sample pass for each class."""
        return "1 per-sample pass for each class" if self.estimator == "exact" else "1 pass"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(f"{type(self).__name__}.probes", self.probes)
        check_positive(f"{type(self).__name__}.temperature", self.temperature)

    def __call__(self, probe: Probe) -> Scores:
        """Estimate the diagonal.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Non-negative scores in float32, or float64 for float64 parameters.
        """
        return self._diagonal(probe)

    def _diagonal(self, probe: Probe) -> Scores:
        key = f"gauss-newton {self.estimator} {self.probes} {self.temperature} {self.seed}"
        return probe.remember(key, lambda: self._exact(probe) if self.estimator == "exact" else self._sampled(probe))

    def _exact(self, probe: Probe) -> Scores:
        def contribution(batch: Any, size: int, _: int) -> Iterable[Tensor]:
            with torch.no_grad():
                classes = probe.logits(batch)[0].shape[1]
            total = probe.zeros()
            for c in range(classes):

                def loss(part: Any, c: int = c) -> Tensor:
                    log_p = (probe.logits(part)[0] / self.temperature).log_softmax(1)[:, c]
                    return -((log_p.detach() / 2).exp() * log_p).sum()

                squares = squared_sums(probe.model, probe.params, loss, batch, size)
                for sum_, square in zip(total, squares, strict=True):
                    sum_.add_(square)
            return total

        return probe.mean("Gauss-Newton diagonal", contribution)

    def _sampled(self, probe: Probe) -> Scores:
        numbers, samples = probe.numbering()
        root = self._root(samples)

        def of_samples(batch: Any, size: int, first: int) -> Iterable[Tensor]:
            with torch.no_grad():
                p = (probe.logits(batch)[0] / self.temperature).softmax(1)

            def loss(part: Any) -> Tensor:
                logits = probe.logits(part[0])[0]
                return torch.sum(logits / self.temperature * part[1])

            return squared_sums(probe.model, probe.params, loss, (batch, root(p, numbers[first : first + size])), size)

        if self.probes >= samples:
            return probe.mean("Gauss-Newton probes", of_samples)

        generator = generator_of(self.seed, "groups")
        group = torch.randperm(samples, generator=generator) % self.probes
        total = dict(zip(probe.params, probe.zeros(), strict=True))
        for k in range(self.probes):

            def of_group(batch: Any, size: int, first: int, k: int = k) -> Iterable[Tensor]:
                mine = numbers[first : first + size]
                members = (group[mine] == k).nonzero()[:, 0]
                if not len(members):
                    return probe.zeros()
                params = list(probe.params.values())
                logits = probe.logits(pick(batch, size, members))[0] / self.temperature
                v = root(logits.detach().softmax(1), mine[members])
                grads = torch.autograd.grad(logits, params, v, allow_unused=True)
                return [torch.zeros_like(w) if g is None else g for w, g in zip(params, grads, strict=True)]

            for name, mean in probe.mean("Gauss-Newton probes", of_group).items():
                total[name].addcmul_(mean, mean, value=samples)
        return total

    def _root(self, samples: int) -> Callable[[Tensor, Tensor], Tensor]:
        """From probabilities (N, C) and the samples' places, random vectors v with E[v v^T] = diag(p) - p p^T."""
        generator = generator_of(self.seed, "signs")

        def labels(p: Tensor, mine: Tensor) -> Tensor:
            drawn = (uniform[mine, None] > p.double().cpu().cumsum(1)).sum(1).clamp(max=p.shape[1] - 1)
            return p - torch.nn.functional.one_hot(drawn, p.shape[1]).to(p)

        def signs(p: Tensor, mine: Tensor) -> Tensor:
            if not table:  # as many columns as there are classes
                table.append(torch.randint(2, (samples, p.shape[1]), dtype=torch.int8, generator=generator))
            scaled = p.sqrt() * (table[0][mine].to(p) * 2 - 1)
            return scaled - p * scaled.sum(1, keepdim=True)

        uniform = torch.rand(samples, generator=generator, dtype=torch.float64)
        table: list[Tensor] = []
        return labels if self.estimator == "gnb" else signs


@dataclass(frozen=True)
class GaussNewtonPruning(GaussNewtonDiagonal):
    """Score every entry by w^2 h / 2, with h the diagonal of `GaussNewtonDiagonal`.

    Args:
        estimator: As in `GaussNewtonDiagonal`.
        probes: As in `GaussNewtonDiagonal`.
        temperature: As in `GaussNewtonDiagonal`.
        seed: As in `GaussNewtonDiagonal`.

    Source:
        Optimal Brain Damage (LeCun et al.), equation 5, with the Gauss-Newton diagonal. Divergences as in
        `GaussNewtonDiagonal`.
    """

    def __call__(self, probe: Probe) -> Scores:
        """Weigh the diagonal by squared weights.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Non-negative scores in float32, or float64 for float64 parameters.
        """
        diagonal = self._diagonal(probe)
        return {name: w.square() * diagonal[name] / 2 for name, w in probe.weights().items()}


@dataclass(frozen=True)
class GaussNewtonTaylor(GaussNewtonDiagonal):
    """Score every entry by |-w g + w^2 h / 2|, with h the diagonal of `GaussNewtonDiagonal`.

    Args:
        estimator: As in `GaussNewtonDiagonal`.
        probes: As in `GaussNewtonDiagonal`.
        temperature: As in `GaussNewtonDiagonal`.
        seed: As in `GaussNewtonDiagonal`.
        taylor_sign: "removal" is the expansion of the loss at the removed weight; "paper" is |w g + w^2 h / 2|, as
            Gollini Navarrete et al. write it.

    Source:
        The second-order Taylor expansion of the loss with the Gauss-Newton diagonal. Divergences as in
        `GaussNewtonDiagonal`.
    """

    taylor_sign: TaylorSign = "removal"

    @property
    def cost(self) -> str:
        """That of the diagonal, and the gradient of the mean."""
        return f"{super().cost}, 1 pass" if self.estimator == "exact" else "2 passes"

    def __call__(self, probe: Probe) -> Scores:
        """Add the first and the second order.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        diagonal, grads = self._diagonal(probe), probe.tempered(self.temperature).grads()
        return {name: taylor(w, grads[name], diagonal[name], self.taylor_sign) for name, w in probe.weights().items()}
