"""Allocations: from scores and a sparsity to exactly as many masked entries as were asked for."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from pl_prune.core.masks import MaskSet
from pl_prune.core.topk import top_k
from pl_prune.core.types import PruneError, check_scores, check_type, prune_count


@dataclass(frozen=True, kw_only=True)
class Allocation(ABC):
    """Decide where the kept entries go.

    Exactly `floor(sparsity * n + 1/2)` of n entries are pruned; ties go to the earlier parameter, then the lower flat
    index; masks over growing sparsity are nested. The three floors hold together with the exact count; a slice or
    layer with fewer entries than its floor is kept whole.

    Args:
        min_keep_rows: Entries kept in every slice of dimension 0 (output channel of a Linear or Conv weight).
        min_keep_cols: Entries kept in every slice of dimension 1 (input channel).
        min_per_layer: Entries kept in every parameter.
    """

    min_keep_rows: int = 0
    min_keep_cols: int = 0
    min_per_layer: int = 0

    def __post_init__(self) -> None:
        for field in ("min_keep_rows", "min_keep_cols", "min_per_layer"):
            floor = getattr(self, field)
            if isinstance(floor, bool) or not isinstance(floor, int) or floor < 0:
                raise PruneError(
                    f"Expected {field} to be an integer of 0 or more; found {floor!r}. Use 0 for no floor."
                )

    def __call__(self, scores: Mapping[str, Tensor], sparsity: float, within: MaskSet | None = None) -> MaskSet:
        """Select what to keep.

        Args:
            scores: Finite scores by parameter name, higher = keep.
            sparsity: Fraction of all entries to prune, in [0, 1).
            within: Only entries that these masks keep may be kept; the sparsity still counts all entries.

        Returns:
            Masks of the scores' names and shapes.

        Raises:
            PruneError: If the sparsity is out of range, a score is not finite, or the floors or `within` cannot hold.
        """
        check_type("scores", scores, Mapping, "what `score` returned for one criterion")
        check_scores(scores)
        total = sum(score.numel() for score in scores.values())
        pool = self._pool(scores, within)
        keep = self._budget(list(scores.values()), sparsity, pool)
        if pool is not None and (available := sum(int(p.count_nonzero()) for p in pool)) < keep:
            raise PruneError(
                f"Expected {keep} entries to keep at sparsity {sparsity}; found only {available} in `within`. "
                "Ask for a higher sparsity."
            )
        required = self._required(list(scores.values()), pool)
        needed = sum(int(r.count_nonzero()) for r in required) if required else 0
        if needed > keep:
            raise PruneError(
                f"Expected the floors (min_keep_rows={self.min_keep_rows}, min_keep_cols={self.min_keep_cols}, "
                f"min_per_layer={self.min_per_layer}) to fit into the {keep} of {total} entries that sparsity {sparsity} "
                f"leaves; found that they need {needed}. Lower the sparsity to {1 - needed / total:.6f} or below, or the floors."
            )
        return MaskSet(dict(zip(scores, self._select(list(scores.values()), keep, pool, required), strict=True)))

    def _pool(self, scores: Mapping[str, Tensor], within: MaskSet | None) -> list[Tensor] | None:
        if within is None:
            return None
        within.check_fits(scores)
        if missing := scores.keys() - within.keys():
            raise PruneError(
                f"Expected `within` to mask every scored parameter; found none for {sorted(missing)[:5]}. "
                "Pass masks of all scored parameters."
            )
        return [within[name].to(score.device) for name, score in scores.items()]

    def _required(self, values: list[Tensor], pool: list[Tensor] | None) -> list[Tensor] | None:
        if not (self.min_keep_rows or self.min_keep_cols or self.min_per_layer):
            return None
        required = []
        for i, value in enumerate(values):
            inside = None if pool is None else pool[i]
            mark = torch.zeros_like(value, dtype=torch.bool)
            if self.min_keep_rows and value.ndim > 1:
                mark |= _best_of_slices(value, inside, 0, self.min_keep_rows, "min_keep_rows")
            if self.min_keep_cols and value.ndim > 1:
                mark |= _best_of_slices(value, inside, 1, self.min_keep_cols, "min_keep_cols")
            if self.min_per_layer:
                flat = value.reshape(1, -1)
                mark |= _best_of_slices(
                    flat, None if inside is None else inside.view_as(flat), 0, self.min_per_layer, "min_per_layer"
                ).view_as(mark)
            required.append(mark)
        return required

    def _budget(self, values: list[Tensor], sparsity: float, pool: list[Tensor] | None) -> int:
        """Count the entries to keep."""
        total = sum(value.numel() for value in values)
        return total - prune_count(sparsity, total)

    @abstractmethod
    def _select(
        self, values: list[Tensor], keep: int, pool: list[Tensor] | None, required: list[Tensor] | None
    ) -> list[Tensor]:
        """Mark exactly `keep` entries: the required ones and the best of the rest of the pool."""


@dataclass(frozen=True)
class Global(Allocation):
    """Keep the highest scores of all parameters together.

    >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.0])}
    >>> Global()(scores, 0.5).counts()
    {'a': (1, 2), 'b': (1, 2)}
    """

    def _select(
        self, values: list[Tensor], keep: int, pool: list[Tensor] | None, required: list[Tensor] | None
    ) -> list[Tensor]:
        if required is None:
            return top_k(values, keep, pool)
        rest = [~r for r in required] if pool is None else [p & ~r for p, r in zip(pool, required, strict=True)]
        chosen = top_k(values, keep - sum(int(r.count_nonzero()) for r in required), rest)
        return [c | r for c, r in zip(chosen, required, strict=True)]


@dataclass(frozen=True)
class LayerAllocation(Allocation):
    """Give every layer a share of the budget, and keep the highest scores of each layer.

    Shares follow Webster's divisor rule: the entry of rank r (0 is best) of a layer of weight w enters the masks in the
    order of (r + 1/2) / w. The total is exact and, unlike with a largest-remainder split, masks are nested.
    """

    @abstractmethod
    def _split(self, shapes: list[torch.Size], sizes: list[int], floors: list[int], keep: int) -> list[int]:
        """Share `keep` out over layers of these shapes; each gets at least its floor and at most its size."""

    def _select(
        self, values: list[Tensor], keep: int, pool: list[Tensor] | None, required: list[Tensor] | None
    ) -> list[Tensor]:
        sizes = [v.numel() for v in values] if pool is None else [int(p.count_nonzero()) for p in pool]
        floors = [int(r.count_nonzero()) for r in required] if required else [0] * len(values)
        shares = self._split([v.shape for v in values], sizes, floors, keep)
        marked = []
        for i, (value, share) in enumerate(zip(values, shares, strict=True)):
            one = Global()._select(
                [value], share, None if pool is None else [pool[i]], None if required is None else [required[i]]
            )
            marked.extend(one)
        return marked


@dataclass(frozen=True)
class Layerwise(LayerAllocation):
    """Prune every layer by the same fraction, to the nearest entry.

    >>> Layerwise()({"a": torch.arange(6.0), "b": torch.arange(2.0)}, 0.5).counts()
    {'a': (3, 6), 'b': (1, 2)}
    """

    def _split(self, shapes: list[torch.Size], sizes: list[int], floors: list[int], keep: int) -> list[int]:
        return webster([max(shape.numel(), 1) for shape in shapes], sizes, floors, keep)


@dataclass(frozen=True)
class ERK(LayerAllocation):
    """Erdos-Renyi-Kernel densities: a layer's density goes with (sum of its dimensions) / (product of them), at most 1.

    Source:
        Evci et al., Rigging the Lottery, section 3 (ERK). Divergence: counts are rounded by Webster's rule so that
        the total is exact.

    >>> ERK()({"a": torch.rand(4, 4), "b": torch.rand(16, 16)}, 0.75).counts()
    {'a': (14, 16), 'b': (54, 256)}
    """

    def _split(self, shapes: list[torch.Size], sizes: list[int], floors: list[int], keep: int) -> list[int]:
        return webster([max(sum(shape), 1) for shape in shapes], sizes, floors, keep)


def _best_of_slices(value: Tensor, inside: Tensor | None, dim: int, count: int, floor: str) -> Tensor:
    """Mark the `count` best entries of every slice of a dimension; ties go to the lower index."""
    rows = value.movedim(dim, 0).flatten(1)
    count = min(count, rows.shape[1])
    order = rows.argsort(dim=1, descending=True, stable=True)
    if inside is not None:
        allowed = inside.movedim(dim, 0).flatten(1)
        if bool((allowed.sum(1) < count).any()):
            raise PruneError(
                f"Expected `within` to keep enough for {floor}={count}; found slices of dimension {dim} of which it keeps fewer. "
                "Lower the floor, or pass wider masks."
            )
        order = order.gather(1, (~allowed).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    mark = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, :count], True)
    if inside is not None:
        mark &= allowed
    return mark.view(value.movedim(dim, 0).shape).movedim(0, dim)


def webster(weights: list[int], sizes: list[int], floors: list[int], keep: int) -> list[int]:
    """Split a number by Webster's divisor rule with floors and caps, ties to the earlier layer.

    Args:
        weights: Positive integers, to which the shares are proportional.
        sizes: The largest share of each.
        floors: The smallest share of each.
        keep: The number to split, from the sum of the floors to the sum of the sizes.

    Returns:
        Shares that sum to `keep`.

    >>> webster([6, 6, 2], [6, 6, 2], [0, 0, 0], 5)
    [2, 2, 1]
    """

    def shares(divisor: Fraction) -> list[int]:
        return [
            min(max(int(divisor * w + Fraction(1, 2)), low), high)
            for w, low, high in zip(weights, floors, sizes, strict=True)
        ]

    low, high = Fraction(0), Fraction(max((s + 1 for s in sizes), default=1))
    while high - low > Fraction(1, 4 * max(weights, default=1)):
        middle = (low + high) / 2
        if sum(shares(middle)) < keep:
            low = middle
        else:
            high = middle
    # Below `low` too few enter; what is missing is at most a few entries a layer.
    counts = shares(low) if sum(shares(low)) <= keep else list(floors)
    queue = [
        (Fraction(2 * n + 1, 2 * w), i)
        for i, (n, w, size) in enumerate(zip(counts, weights, sizes, strict=True))
        if n < size
    ]
    heapq.heapify(queue)
    for _ in range(keep - sum(counts)):
        _, i = heapq.heappop(queue)
        counts[i] += 1
        if counts[i] < sizes[i]:
            heapq.heappush(queue, (Fraction(2 * counts[i] + 1, 2 * weights[i]), i))
    return counts
