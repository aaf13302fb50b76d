"""`Entries`: what the figures need of a run's scores and masks, small enough to hold for many runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf, isinf, nan

import torch
from torch import Tensor

from pl_prune.core.types import PruneError

SAMPLE = 1 << 18
"""Entries looked at of one run, unless it has no more; the same places of every run of one architecture."""


@dataclass(frozen=True)
class Entries:
    """A sample of the entries of one run.

    Args:
        row: What to call the run.
        place: Of its row in the study, which decides its colour.
        weights: Hash of the weights that were scored; nothing where nobody knows.
        shapes: Of the scored parameters, by name.
        scores: Of the sampled entries, in float64.
        kept: Whether they are kept.
        threshold: The lowest kept score, where every entry of a higher score is kept and none of a lower one; None
            where scores of kept and pruned entries overlap, or all are kept or pruned. Of all entries.
        total: Entries in all.
    """

    row: str
    place: int
    weights: str
    shapes: dict[str, tuple[int, ...]]
    scores: Tensor
    kept: Tensor
    threshold: float | None
    total: int


def entries(
    row: str,
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    place: int = 0,
    weights: str = "",
    sample: int = SAMPLE,
) -> Entries:
    """Sample a run's entries.

    Args:
        row: What to call the run.
        scores: By parameter name.
        masks: Boolean, True = keep; parameters without scores are left out, and those without a mask too.
        place: Of its row in the study.
        weights: Hash of the weights that were scored.
        sample: Entries at most.

    Returns:
        The sample; all entries where there are no more.

    Raises:
        PruneError: If scores and masks of a parameter have different shapes, or have no parameter in common.
    """
    names = [name for name in sorted(scores) if name in masks]
    odd = [name for name in names if scores[name].shape != masks[name].shape]
    if odd or not names:
        found = (
            f"scores {tuple(scores[odd[0]].shape)} and a mask {tuple(masks[odd[0]].shape)} of {odd[0]!r}"
            if odd
            else "none"
        )
        raise PruneError(f"Expected scores and masks of the same parameters; found {found}. Run the fit again.")
    shapes = {name: tuple(scores[name].shape) for name in names}
    total = sum(scores[name].numel() for name in names)
    places = _places(total, sample)
    found_scores, found_kept, start = [], [], 0
    low, high = inf, -inf
    for name in names:
        score, keep = scores[name].detach().flatten(), masks[name].flatten()
        here = places[torch.searchsorted(places, start) : torch.searchsorted(places, start + score.numel())] - start
        found_scores.append(score[here].double())
        found_kept.append(keep[here])
        low = min(low, float(torch.where(keep, score, inf).min())) if score.numel() else low
        high = max(high, float(torch.where(keep, -inf, score).max())) if score.numel() else high
        start += score.numel()
    threshold = low if high <= low and not isinf(low) and not isinf(high) else None
    return Entries(row, place, weights, shapes, torch.cat(found_scores), torch.cat(found_kept), threshold, total)


def _places(total: int, sample: int) -> Tensor:
    """Return ascending places, drawn by a seed of their own: a fixed step would meet the same place of every kernel."""
    if total <= sample:
        return torch.arange(total)
    return torch.randint(total, (sample,), generator=torch.Generator().manual_seed(0)).unique()  # type: ignore[no-any-return, no-untyped-call]


def ranks(values: Tensor) -> Tensor:
    """Rank values; equal ones share the mean of their ranks.

    Args:
        values: One dimension.

    Returns:
        Ranks from 0, in float64.

    >>> import torch
    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist()
    [2.5, 0.0, 2.5, 1.0]
    """
    place: Tensor
    _, place, counts = values.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    middle: Tensor = counts.cumsum(0).double() - (counts.double() + 1) / 2
    return middle[place]


def _unit(one: Entries) -> Tensor:
    centred = ranks(one.scores)
    centred -= centred.mean()
    size = float(centred.norm())
    return centred / size if size else centred * nan


def rank_correlations(found: Sequence[Entries]) -> list[list[float]]:
    """Correlate the scores of every two runs.

    Args:
        found: The runs.

    Returns:
        Spearman's rank correlation of the sampled entries, a line for each run; NaN for two architectures, and where all
        scores of a run are equal.

    Source:
        Spearman, The proof and measurement of association between two things. Table 4 of IPPRO correlates scores without
        saying by which coefficient; ranks are what pruning looks at, and do not depend on the scale of a score.
    """
    with ThreadPoolExecutor(2) as pool:  # sorting leaves the interpreter free
        units = list(pool.map(_unit, found))
    table = [[nan] * len(found) for _ in found]
    for i, one in enumerate(found):
        for j in range(i + 1):
            if one.shapes == found[j].shapes:
                table[i][j] = table[j][i] = float(units[i] @ units[j])
    return table
