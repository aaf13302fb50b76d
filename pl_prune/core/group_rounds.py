"""The rounds of structured pruning: score, remove a part, score what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from pl_prune.core.groups import Group, GroupScores, Member, ParameterGroups
from pl_prune.core.iterate import sparsity_after
from pl_prune.core.masks import MaskSet

Score = Callable[[MaskSet | None], GroupScores]
Select = Callable[[GroupScores, float, dict[str, float], MaskSet | None], MaskSet]


def prune_in_rounds(
    score: Score, select: Select, rounds: int, sparsity: float, ratios: Mapping[str, float] | None = None
) -> tuple[MaskSet, GroupScores]:
    """Score and remove units in rounds; what one round removed stays removed.

    Round e of E keeps the fraction (1 - sparsity)^(e / E) of what there was at the start, and of the layers with a ratio of
    their own (1 - ratio)^(e / E); the last round keeps exactly what was asked.

    Args:
        score: Scores the units that are left of those that are kept, by root in their order; None: all of them.
        select: Returns which units stay, of scores of all units, a sparsity, ratios, and the units that are kept so far.
        rounds: How many.
        sparsity: Fraction to remove in the end, in [0, 1).
        ratios: Fractions to remove of the layers of a pattern, in the end.

    Returns:
        Masks over units, and of every unit the last score that it got.
    """
    keep, scores = None, score(None)
    if rounds > 1:  # a target out of reach is refused before more is scored
        select(scores, sparsity, dict(ratios or {}), None)
    for done in range(1, rounds + 1):
        if keep is not None:
            scores = {root: _replaced(scores[root], keep[root], left) for root, left in score(keep).items()}
        shares = {pattern: sparsity_after(done, rounds, ratio) for pattern, ratio in (ratios or {}).items()}
        keep = select(scores, sparsity_after(done, rounds, sparsity), shares, keep)
    assert keep is not None
    return keep, scores


def without(groups: ParameterGroups, keep: Mapping[str, Tensor]) -> ParameterGroups:
    """Return the groups of the network from which units have been sliced.

    Args:
        groups: The groups of the whole network.
        keep: Which units stay, (size,) of bool by root.

    Returns:
        What tracing the smaller network would find, groups of one unit apart, which stay.

    >>> rows = Member("a.weight", 0, torch.arange(3)[:, None])
    >>> whole = ParameterGroups([Group("a", 3, (rows,))], {"a.weight": (3, 2)})
    >>> small = without(whole, {"a": torch.tensor([True, False, True])})
    >>> small.sizes, small["a"].members[0].index.tolist(), small.shapes
    ({'a': 2}, [[0], [1]], {'a.weight': (2, 2)})
    """
    positions = groups.positions(keep)
    places = {
        (name, dim): torch.zeros(groups.shapes[name][dim], dtype=torch.int64).index_put_(
            (kept,), torch.arange(len(kept))
        )
        for name, dims in positions.items()
        for dim, kept in dims.items()
    }

    def moved(member: Member, kept: Tensor) -> Member:
        index = member.index[kept]
        place = places.get((member.name, member.dim))
        return Member(member.name, member.dim, index if place is None else place[index], member.kind)

    left = []
    for group in groups:
        kept = keep[group.root].cpu() if group.root in keep else torch.ones(group.size, dtype=torch.bool)
        members = tuple(moved(member, kept) for member in group.members)
        left.append(Group(group.root, int(kept.sum()), members, group.exact))
    shapes = {
        name: tuple(len(positions.get(name, {}).get(dim, range(n))) for dim, n in enumerate(shape))
        for name, shape in groups.shapes.items()
    }
    macs = {name: n * prod(shapes[name]) // max(prod(groups.shapes[name]), 1) for name, n in groups.macs.items()}
    return ParameterGroups(left, shapes, macs, groups.rejected)


def _replaced(scores: Tensor, kept: Tensor, left: Tensor) -> Tensor:
    return scores.to(left).masked_scatter(kept.to(left.device), left)
