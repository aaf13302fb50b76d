"""Criteria from Hutchinson's estimate of the Hessian's diagonal, as published."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pl_prune.core.batch import cut
from pl_prune.core.criterion import Criterion
from pl_prune.core.probe import Probe
from pl_prune.core.seeds import generator_of
from pl_prune.core.types import Scores, check_count, check_positive
from pl_prune.criteria.fisher import TaylorSign, taylor


@dataclass(frozen=True)
class HutchinsonDiagonal(Criterion):
    """Score every entry by the signed estimate of the Hessian's diagonal, the mean of z * (H z) over Rademacher probes z (HD).

    With ten probes the estimate is mostly noise, whose size is the norm of the Hessian's off-diagonal row; that is
    the published method, and `GaussNewtonDiagonal`
    is the accurate estimate of the same diagonal.

    Args:
        probes: Number of probe vectors.
        temperature: Divides the logits of the cross-entropy; 1 keeps the module's own loss.
        probe_per: "round" uses the same probes for all samples and ranks, so that cutting the data otherwise changes
            nothing; "sample" draws
            new ones for each sample, as published, and is as slow as that.
        seed: Seed of the probes, drawn on the CPU.

    Source:
        Gollini Navarrete et al. (What Scalable Second-Order Information Knows for Pruning at Initialization), HD,
        equation 15. Divergences: the temperature of 200 is
        in their code and not in the paper; their probes span all trainable parameters, ours the prunable ones (same
        mean, lower variance); the paper calls the
        estimate AdaHessian's, which averages |H z| over kernels and is another quantity.
    """

    probes: int = 10
    temperature: float = 200.0
    probe_per: Literal["round", "sample"] = "round"
    seed: int = 0
    needs_logits: ClassVar[bool] = True
    curvature: ClassVar[str] = "Hessian diagonal, noisy"

    @property
    def cost(self) -> str:
        """A Hessian product for each probe."""
        return f"{self.probes} Hessian products"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(f"{type(self).__name__}.probes", self.probes)
        check_positive(f"{type(self).__name__}.temperature", self.temperature)

    def __call__(self, probe: Probe) -> Scores:
        """Estimate the diagonal.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Signed scores in float32, or float64 for float64 parameters.
        """
        return self._diagonal(probe)

    def _diagonal(self, probe: Probe) -> Scores:
        tempered = probe.tempered(self.temperature)
        key = f"hutchinson {self.probes} {self.probe_per} {self.seed}"
        return tempered.remember(key, lambda: self._estimate(tempered))

    def _estimate(self, probe: Probe) -> Scores:
        shared = _Signs(probe, self.probes, self.seed) if self.probe_per == "round" else None
        numbers, _ = probe.numbering()

        def contribution(batch: Any, size: int, first: int) -> Iterable[Tensor]:
            total = probe.zeros()
            parts = [(batch, shared, size)]
            if shared is None:
                # One sample after another, each with probes that its place in the data decides.
                seeds = [self.seed * 1_000_003 + number + 1 for number in numbers[first : first + size].tolist()]
                parts = [
                    (cut(batch, size, i, i + 1), _Signs(probe, self.probes, seed), 1) for i, seed in enumerate(seeds)
                ]
            for part, signs, weight in parts:
                assert signs is not None
                current: list[Tensor] = []
                for product in probe.batch_hvps(part, signs.vectors(current)):
                    for sum_, z in zip(total, current, strict=True):
                        sum_.addcmul_(product.pop(0).to(sum_.dtype), z.to(sum_.dtype), value=weight / self.probes)
            return total

        return probe.mean("Hutchinson probes", contribution)


@dataclass(frozen=True)
class HutchinsonPruning(HutchinsonDiagonal):
    """Score every entry by w^2 h / 2, with h the signed estimate of `HutchinsonDiagonal` (HP).

    Args:
        probes: As in `HutchinsonDiagonal`.
        temperature: As in `HutchinsonDiagonal`.
        probe_per: As in `HutchinsonDiagonal`.
        seed: As in `HutchinsonDiagonal`.

    Source:
        Gollini Navarrete et al., HP. Divergences as in `HutchinsonDiagonal`; like there, the estimate keeps its sign,
        so entries of negative estimate go first.
    """

    def __call__(self, probe: Probe) -> Scores:
        """Weigh the estimate by squared weights.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Signed scores in float32, or float64 for float64 parameters.
        """
        diagonal = self._diagonal(probe)
        return {name: w.square() * diagonal[name] / 2 for name, w in probe.weights().items()}


@dataclass(frozen=True)
class HutchinsonTaylor(HutchinsonDiagonal):
    """Score every entry by |w g + w^2 h / 2|, with h as in `HutchinsonDiagonal` and g at the same temperature (HTS).

    At the published temperature the second order weighs 200 times less than the first: with an accurate diagonal the
    ranking would be that of `SNIP`.

    Args:
        probes: As in `HutchinsonDiagonal`.
        temperature: As in `HutchinsonDiagonal`.
        probe_per: As in `HutchinsonDiagonal`.
        seed: As in `HutchinsonDiagonal`.
        taylor_sign: "paper" as written there; "removal" for |-w g + w^2 h / 2|, the expansion of the loss at the
            removed weight.

    Source:
        Gollini Navarrete et al., HTS, equations 14, 16 and 17. Divergences as in `HutchinsonDiagonal` and, for the
        sign, `FisherTaylor`.
    """

    taylor_sign: TaylorSign = "paper"

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


class _Signs:
    """Rademacher vectors, one bit an entry: the same on every rank and device."""

    def __init__(self, probe: Probe, count: int, seed: int) -> None:
        generator = generator_of(seed, "signs")  # and not the stream that drew the weights
        self.count = count
        self.params = list(probe.params.values())
        self.bits = [
            [torch.randint(256, p.shape, dtype=torch.uint8, generator=generator).to(p.device) for p in self.params]
            for _ in range(-(-count // 8))
        ]

    def vectors(self, current: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield one vector after another, in a list that the caller may look into."""
        for k in range(self.count):
            current.clear()  # its memory is free before the next one takes as much
            for bits, p in zip(self.bits[k // 8], self.params, strict=True):
                current.append(((bits >> (k % 8)) & 1).to(torch.int8).mul_(2).sub_(1).to(p.dtype))
            yield current
