"""Rounds of structured pruning: what is asked of scores and budgets in each."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from refusal import expect_refusal
from test_group_budget import left, problem

import pl_prune as plp
from pl_prune.core.group_rounds import prune_in_rounds


def run(groups, rounds, sparsity, ratios=None, **budget):
    """Rounds whose scores are drawn anew each time; returns what each kept and was asked for."""
    generator, kept, asked = torch.Generator().manual_seed(0), [], []

    def score(keep):
        sizes = groups.sizes if keep is None else {root: int(mask.sum()) for root, mask in keep.items()}
        return {root: torch.randn(size, generator=generator) for root, size in sizes.items()}

    def select(scores, share, ratios, keep):
        asked.append(share)
        kept.append(plp.select_units(scores, groups, share, ratios=ratios, within=keep, **budget))
        return kept[-1]

    keep, scores = prune_in_rounds(score, select, rounds, sparsity, ratios)
    return keep, scores, kept[rounds > 1 :], asked[rounds > 1 :]


@pytest.mark.parametrize("target", ["groups", "params", "macs"])
@pytest.mark.parametrize("allocation", [plp.Global(), plp.Layerwise()], ids=["global", "layerwise"])
@pytest.mark.parametrize("more", [{}, {"round_to": 4}, {"ratios": {"0": 0.75}}], ids=str)
def test_what_is_removed_stays_removed_and_the_budget_is_that_of_one_round(target, allocation, more):
    groups, _ = problem()
    keep, _, kept, asked = run(groups, 4, 0.7, target=target, allocation=allocation, **more)
    assert asked == pytest.approx([1 - 0.3 ** (e / 4) for e in (1, 2, 3, 4)])
    assert asked[-1] == 0.7
    for before, after in pairwise(kept):
        assert all(not bool((after[root] & ~before[root]).any()) for root in after)
        assert "round_to" in more or any(bool((before[root] & ~after[root]).any()) for root in after)
    assert keep == kept[-1]
    whole = left(groups, {r: torch.ones(n, dtype=torch.bool) for r, n in groups.sizes.items()}, target)
    assert left(groups, keep, target) <= whole * 0.3 + 0.5
    if target == "groups" and not more:
        assert left(groups, keep, target) == 19  # of 62, as one round leaves
    if "ratios" in more:
        assert int(keep["0"].sum()) == 3
    if "round_to" in more:
        assert all(int(mask.sum()) % 4 == 0 or bool(mask.all()) for one in kept for mask in one.values())


def test_units_keep_the_score_that_they_had_last():
    groups, _ = problem()
    _, scores, kept, _ = run(groups, 2, 0.5)
    generator = torch.Generator().manual_seed(0)
    for root, size in groups.sizes.items():
        first = torch.randn(size, generator=generator)
        gone = ~kept[0][root]
        assert bool(gone.any())
        assert torch.equal(scores[root][gone], first[gone])
        assert not bool((scores[root][~gone] == first[~gone]).any())


def test_a_target_out_of_reach_is_refused_before_a_second_pass():
    groups, scores = problem()
    calls = []

    def score(keep):
        calls.append(keep)
        return scores

    def select(scores, share, ratios, keep):
        return plp.select_units(scores, groups, share, ratios=ratios, within=keep)

    with expect_refusal("0.99 of the groups"):
        prune_in_rounds(score, select, 50, 0.99)
    assert calls == [None]
