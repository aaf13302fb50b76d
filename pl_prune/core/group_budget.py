"""`select_units`: which units stay, for a budget of units, parameters or multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pl_prune.core.allocate import Allocation, Global
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import (
    PruneError,
    check_choice,
    check_count,
    check_scores,
    check_sparsity,
    check_type,
    plain,
    prune_count,
)

Target: TypeAlias = Literal["groups", "params", "macs"]


def select_units(
    scores: Mapping[str, Tensor],
    groups: ParameterGroups,
    sparsity: float,
    target: Target = "groups",
    allocation: Allocation | None = None,
    round_to: int | None = None,
    ratios: Mapping[str, float] | None = None,
    within: MaskSet | None = None,
) -> MaskSet:
    """Remove as few of the lowest units as bring a network down to its budget; at least one unit of each group stays.

    Args:
        scores: One finite score per unit by root, higher = keep.
        groups: The groups.
        sparsity: Fraction to remove, in [0, 1).
        target: Of what: of all units, or of the parameters or multiply-accumulates of the whole network, as counted after
            slicing. The units to remove are found by bisection, since the masks of an allocation are nested.
        allocation: Where the kept units go; `Global()` when None.
        round_to: Units left in a group are a multiple of this, rounded up, or all of them.
        ratios: Fraction of the units to remove, by shell pattern on roots, for groups that are to lose a fixed share; the
            first pattern that matches counts. The others have to meet the budget.
        within: Which units are left (what this function returned for a lower sparsity): no other comes back, and the scores
            of the others do not count.

    Returns:
        Masks over units.

    Raises:
        PruneError: If the scores are not those of the groups, a pattern matches nothing, the budget cannot be met, or an
            argument is not of its kind.

    >>> from pl_prune.core.groups import Group, Member
    >>> rows = Member("a.weight", 0, torch.arange(4)[:, None])
    >>> groups = ParameterGroups([Group("a", 4, (rows,))], {"a.weight": (4, 3)})
    >>> select_units({"a": torch.tensor([3.0, 0.0, 2.0, 1.0])}, groups, 0.5)["a"].tolist()
    [True, False, True, False]
    """
    allocation = allocation or Global()
    check_budget(sparsity, target, allocation, round_to, ratios)
    check_scores(scores)
    if {root: (size,) for root, size in groups.sizes.items()} != {r: tuple(s.shape) for r, s in scores.items()}:
        raise PruneError(
            f"Expected scores of the {len(groups)} groups; found others ({list(scores)[:4]}). Pass what `score_groups` returned."
        )
    allocation = replace(allocation, min_per_layer=max(1, allocation.min_per_layer))
    fixed = _fixed(scores, ratios or {}, within)
    free = {root: score for root, score in scores.items() if root not in fixed}
    pool = None if within is None else MaskSet({root: within[root] for root in free})
    total = sum(score.numel() for score in free.values())
    most = total - sum(min(score.numel(), allocation.min_per_layer) for score in free.values())
    everything = _left(groups, {}, target)
    budget = everything - prune_count(sparsity, everything)

    def keep(removed: int) -> MaskSet:
        chosen = dict(allocation(free, removed / total, pool)) if free and removed else {}
        whole = {root: torch.ones(score.numel(), dtype=torch.bool) for root, score in free.items()}
        units = {root: mask.cpu() for root, mask in {**whole, **chosen, **fixed}.items()}
        return MaskSet({
            root: _rounded(units[root], scores[root], round_to or 1, None if within is None else within[root])
            for root in scores
        })

    low, high = 0 if pool is None else sum(int((~mask).sum()) for mask in pool.values()), most
    if _left(groups, keep(most), target) > budget and (free or sparsity):
        reachable = 1 - Fraction(_left(groups, keep(most), target), everything)
        nearest = int(reachable * 10_000) / 10_000
        raise PruneError(
            f"Expected to remove {sparsity:.4g} of the {target}; found that at most {nearest:.4f} can go, with "
            f"{allocation.min_per_layer} unit{'s' * (allocation.min_per_layer > 1)} left in each of {len(groups)} groups. "
            "Lower the sparsity, or let more layers be pruned (`exact=False`, `include`, `exclude`)."
        )
    while low < high:
        middle = (low + high) // 2
        if _left(groups, keep(middle), target) <= budget:
            high = middle
        else:
            low = middle + 1
    return keep(low)


def check_budget(
    sparsity: float, target: str, allocation: Allocation, round_to: int | None, ratios: Mapping[str, float] | None
) -> None:
    """Raise unless arguments of `select_units` are of their kinds.

    Args:
        sparsity: A fraction.
        target: What is counted.
        allocation: Where the kept units go.
        round_to: A whole number of 1 or more, or None.
        ratios: Fractions by pattern, or None.

    Raises:
        PruneError: If one of them is not.
    """
    check_sparsity(sparsity, target)
    check_choice("target", target, get_args(Target))
    check_type("allocation", allocation, Allocation, "for example pl_prune.Layerwise()")
    if round_to is not None:
        check_count("round_to", round_to)
    if ratios is not None:
        check_type("ratios", ratios, Mapping, "for example {'layer1.*': 0.5}")
        for ratio in ratios.values():
            check_sparsity(ratio)


def _fixed(scores: Mapping[str, Tensor], ratios: Mapping[str, float], within: MaskSet | None) -> dict[str, Tensor]:
    fixed: dict[str, Tensor] = {}
    for pattern, ratio in ratios.items():
        hits = [root for root in scores if fnmatchcase(plain(root), pattern)]
        if not hits:
            raise PruneError(
                f"Expected every pattern of `ratios` to match a group; found nothing for {pattern!r}. Groups are {list(scores)[:8]}."
            )
        for root in hits:
            size = scores[root].numel()
            gone = min(prune_count(ratio, size), size - 1)
            pool = None if within is None else MaskSet({root: within[root]})
            fixed.setdefault(root, Global()({root: scores[root]}, gone / size, pool)[root])
    return fixed


def _rounded(mask: Tensor, score: Tensor, multiple: int, within: Tensor | None) -> Tensor:
    """Take the best removed units back until the number of those left is a multiple."""
    count = int(mask.sum())
    wanted = min(-(-count // multiple) * multiple, mask.numel())
    if wanted == count:
        return mask
    order = score.cpu().argsort(descending=True, stable=True)
    free = ~mask if within is None else ~mask & within.cpu()
    back = order[free[order]][: wanted - count]
    return mask.index_fill(0, back, True)


def _left(groups: ParameterGroups, keep: Mapping[str, Tensor], target: Target) -> int:
    if target == "groups":
        return sum(int(keep[root].sum()) if root in keep else size for root, size in groups.sizes.items())
    return groups.cost(keep)[("params", "macs").index(target)]
