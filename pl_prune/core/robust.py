"""An allocation that compares layers by how far an entry stands out in its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pl_prune.core.allocate import Allocation, Global
from pl_prune.core.types import check_choice


@dataclass(frozen=True)
class Robust(Allocation):
    """Keep what lies above one threshold alpha of all layers, counted in each layer's own scale from its own centre.

    That is the highest (score - location) / scale of all layers together; no alpha is searched. Densities come out
    nearly alike where layers have scores of nearly the same distribution. Where more than half of a layer's scores are
    equal, so that its MAD is zero, the standard deviation takes its place; a layer of equal scores stands at its centre.

    Args:
        scope: "standardized" takes location and scale from each layer; "pooled" from all scores together, which selects
            what `Global` does.
        location: "median", with the median absolute deviation (MAD) as the scale, or "mean", with the standard deviation.

    Source:
        You Only Prune Once (YOPO), equations 10 to 12: the text's YOPO-G. Divergences: the paper's algorithm 2 thresholds
        pooled scores instead, and reaches no sparsity below the location, since its alpha starts at zero; counts
        here are exact. Its MAD is plain, without the factor 1.4826, and so is ours.

    >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0, 9.0]), "b": torch.tensor([10.0, 20.0, 30.0, 90.0])}
    >>> Robust()(scores, 0.5).counts()
    {'a': (2, 4), 'b': (2, 4)}
    """

    scope: Literal["standardized", "pooled"] = "standardized"
    location: Literal["median", "mean"] = "median"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("Robust.scope", self.scope, ("standardized", "pooled"))
        check_choice("Robust.location", self.location, ("median", "mean"))

    def _select(
        self, values: list[Tensor], keep: int, pool: list[Tensor] | None, required: list[Tensor] | None
    ) -> list[Tensor]:
        plain = Global()
        if self.scope == "pooled":
            return plain._select(values, keep, pool, required)
        # Rounding may make unequal scores of a layer equal once they are standardized: only the counts are taken.
        counts = [
            int(m.count_nonzero()) for m in plain._select(list(map(self._standardized, values)), keep, pool, required)
        ]
        return [
            plain._select(
                [value], count, None if pool is None else [pool[i]], None if required is None else [required[i]]
            )[0]
            for i, (value, count) in enumerate(zip(values, counts, strict=True))
        ]

    def _standardized(self, value: Tensor) -> Tensor:
        if not value.numel():
            return value
        x = value.double()
        x = x / x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)  # squares neither overflow nor vanish
        spread = x.std(correction=0)
        if self.location == "mean":
            center = x.mean()
        else:
            center = _median(x)
            deviation = _median((x - center).abs())
            spread = torch.where(deviation > 0, deviation, spread)
        return (x - center) / torch.where(spread > 0, spread, 1)


def _median(x: Tensor) -> Tensor:
    """Return the mean of the two middle values, of any number of entries."""
    return (x.median() - x.neg().median()) / 2  # `kthvalue` on CUDA is refused under deterministic algorithms
