"""Criteria from accurate estimates of the Gauss-Newton matrix's diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pl_prune.core.criterion import Criterion
from pl_prune.core.persample import squared_sums
from pl_prune.core.probe import Probe
from pl_prune.core.types import PruneError, Scores
from pl_prune.criteria.fisher import TaylorSign, taylor

_Root = Callable[[Tensor, Tensor], Tensor]
_MEMORY = 2**31  # bytes of gradients, of probes that share a forward pass


@dataclass(frozen=True)
class GaussNewtonDiagonal(Criterion):
    """Score every entry by the diagonal of the generalised Gauss-Newton matrix of the cross-entropy.

    In a network of piecewise linear activations with batch norm in evaluation mode it is the exact diagonal of the
    Hessian, and never negative: what `HutchinsonDiagonal`
    estimates with much noise.

    Args:
        estimator: "gnb" draws labels from the model's own softmax and squares the summed gradient: one backward pass
            for each probe, relative error about sqrt(2 / probes). "sketch"
            does the same with random signs instead of labels. "exact" takes one per-sample pass for each class.
        probes: Number of probes of "gnb" and "sketch".
        temperature: Divides the logits.
        seed: Seed of the probes, drawn on the CPU.

    Source:
        The label-sampling estimator is that of Liu et al. (Sophia), algorithm 2 (Gauss-Newton-Bartlett). Divergence:
        it is the mean over probes, over
        all samples of the scoring set and all ranks, not a running average. Not a method of Gollini Navarrete et al.:
        a better estimate of their HD is another method.
    """

    estimator: Literal["gnb", "sketch", "exact"] = "gnb"
    probes: int = 10
    temperature: float = 1.0
    seed: int = 0
    needs_logits: ClassVar[bool] = True
    curvature: ClassVar[str] = "Gauss-Newton diagonal"

    @property
    def cost(self) -> str:
        """A backward pass for each probe, or a per-sample pass for each class."""
        return "1 per-sample pass for each class" if self.estimator == "exact" else f"{self.probes} passes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1 or self.temperature <= 0:
            raise PruneError(
                f"Expected at least one probe and a positive temperature; found probes={self.probes}, temperature={self.temperature}. "
                "The defaults are 10 and 1."
            )

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

        return probe.means("Gauss-Newton diagonal", contribution)[0]

    def _sampled(self, probe: Probe) -> Scores:
        samples = probe.sample_count()
        total = dict(zip(probe.params, probe.zeros(), strict=True))
        at_once = max(1, _MEMORY // sum(w.nbytes for w in total.values()))  # each probe keeps a gradient in memory
        for start in range(0, self.probes, at_once):
            roots = [self._root(samples, k) for k in range(start, min(start + at_once, self.probes))]

            def contribution(batch: Any, size: int, first: int, roots: list[_Root] = roots) -> Iterator[Tensor]:
                params = list(probe.params.values())
                logits = probe.logits(batch)[0] / self.temperature
                p = logits.detach().softmax(1)
                mine = torch.tensor([probe.sample_number(first + i) for i in range(size)])
                for root in roots:
                    grads = torch.autograd.grad(logits, params, root(p, mine), retain_graph=True, allow_unused=True)
                    yield from (torch.zeros_like(w) if g is None else g for w, g in zip(params, grads, strict=True))

            for mean in probe.means("Gauss-Newton probes", contribution, len(roots)):
                for name, sum_ in total.items():
                    sum_.addcmul_(mean[name], mean[name], value=samples / self.probes)
        return total

    def _root(self, samples: int, k: int) -> _Root:
        """Return probe k: from probabilities (N, C) and the samples' places, vectors v of E[v v^T] = diag(p) - p p^T."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + k)
        uniform = torch.rand(samples, generator=generator, dtype=torch.float64)
        sign_seed = int(torch.randint(2**31, (1,), generator=generator))

        def labels(p: Tensor, mine: Tensor) -> Tensor:
            drawn = (uniform[mine, None] > p.double().cpu().cumsum(1)).sum(1).clamp(max=p.shape[1] - 1)
            return p - torch.nn.functional.one_hot(drawn, p.shape[1]).to(p)

        def signs(p: Tensor, mine: Tensor) -> Tensor:
            table = torch.Generator().manual_seed(sign_seed)
            scaled = p.sqrt() * (torch.randint(2, (samples, p.shape[1]), generator=table)[mine].to(p) * 2 - 1)
            return scaled - p * scaled.sum(1, keepdim=True)

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
        return f"{super().cost}, 1 pass"

    def __call__(self, probe: Probe) -> Scores:
        """Add the first and the second order.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Scores in float32, or float64 for float64 parameters.
        """
        diagonal, grads = self._diagonal(probe), probe.tempered(self.temperature).grads()
        return {name: taylor(w, grads[name], diagonal[name], self.taylor_sign) for name, w in probe.weights().items()}
