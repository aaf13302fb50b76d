from __future__ import annotations

import re

import pytest
import torch
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core.group_budget import select_units


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(320, 30),
        nn.ReLU(), nn.Linear(30, 5),
    )  # fmt: skip
    groups = plp.trace_groups(net, torch.randn(2, 3, 8, 8))
    generator = torch.Generator().manual_seed(1)
    return groups, {root: torch.rand(size, generator=generator) for root, size in groups.sizes.items()}


def left(groups, keep, target):
    if target == "groups":
        return sum(int(m.sum()) for m in keep.values())
    return groups.cost(keep)[("params", "macs").index(target)]


@pytest.mark.parametrize("target", ["groups", "params", "macs"])
@pytest.mark.parametrize("allocation", [plp.Global(), plp.Layerwise()])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_as_few_units_go_as_the_budget_asks(target, allocation, sparsity):
    groups, scores = problem()
    keep = select_units(scores, groups, sparsity, target, allocation)
    whole = left(groups, {r: torch.ones(n, dtype=torch.bool) for r, n in groups.sizes.items()}, target)
    assert left(groups, keep, target) <= whole * (1 - sparsity) + 0.5
    total, kept = sum(groups.sizes.values()), sum(int(m.sum()) for m in keep.values())
    if kept < total:  # with one unit more the budget is missed: every number of units tried
        wider = type(allocation)(min_per_layer=1)(scores, (total - kept - 1) / total)
        assert left(groups, wider, target) > whole * (1 - sparsity) + 0.5
    for root, mask in keep.items():
        assert bool(mask.any())
        if not bool(mask.all()):
            assert scores[root][mask].min() > scores[root][~mask].max()


@pytest.mark.parametrize("target", ["groups", "macs"])
def test_what_is_left_is_rounded_up_and_still_within_the_budget(target):
    groups, scores = problem()
    keep = select_units(scores, groups, 0.5, target, round_to=4)
    assert all(int(m.sum()) % 4 == 0 or bool(m.all()) for m in keep.values())
    assert left(groups, keep, target) <= left(groups, select_units(scores, groups, 0.0), target) / 2


def test_ratios_are_those_of_their_layers_and_the_others_meet_the_budget():
    groups, scores = problem()
    keep = select_units(scores, groups, 0.04, "groups", ratios={"0": 0.25, "*": 0.0})
    assert [int(m.sum()) for m in keep.values()] == [9, 20, 30]
    keep = select_units(scores, groups, 0.5, "groups", ratios={"0": 0.25})
    assert int(keep["0"].sum()) == 9
    assert left(groups, keep, "groups") == 31
    assert int(select_units(scores, groups, 0.1, ratios={"3": 0.999})["3"].sum()) == 1


@pytest.mark.parametrize("target", ["groups", "params", "macs"])
def test_a_target_out_of_reach_names_the_nearest_one_that_is_not(target):
    groups, scores = problem()
    with pytest.raises(plp.PruneError, match=r"at most (0\.\d{4}) can go") as caught:
        select_units(scores, groups, 0.9995, target)
    nearest = float(re.search(r"at most (0\.\d{4})", str(caught.value))[1])
    keep = select_units(scores, groups, nearest, target)
    whole = left(groups, {r: torch.ones(n, dtype=torch.bool) for r, n in groups.sizes.items()}, target)
    assert left(groups, keep, target) <= whole * (1 - nearest) + 0.5
    with expect_refusal("at most", "Lower the sparsity"):
        select_units(scores, groups, min(nearest + 0.01, 0.9999), target)


def test_bad_input_is_refused():
    groups, scores = problem()
    with expect_refusal("ratios"):
        select_units(scores, groups, 0.5, ratios={"none*": 0.5})
    with expect_refusal("score_groups"):
        select_units({"0": scores["0"]}, groups, 0.5)
    with expect_refusal("target"):
        select_units(scores, groups, 0.5, "flops")
    with expect_refusal("round_to"):
        plp.StructuredPruning(round_to=0)
    with expect_refusal("sparsity"):
        plp.StructuredPruning(ratios={"0": 50})
