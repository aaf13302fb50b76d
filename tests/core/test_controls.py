"""Controls keep every layer's count and destroy what they say they destroy, whatever else is drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pl_prune as plp
from pl_prune.core.controls import inverted, reinitialise_


def problem():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(shape, generator=generator) for name, shape in {"a": (30, 20), "b": (8, 3, 3)}.items()}
    return scores, plp.Global()(scores, 0.8)


def test_shuffling_is_decided_by_seed_name_and_size_alone():
    _, masks = problem()
    shuffled = masks.shuffled(3)
    assert shuffled.counts() == masks.counts()
    assert shuffled == masks.shuffled(3)
    assert shuffled != masks
    assert shuffled != masks.shuffled(4)
    alone = plp.MaskSet({"_orig_mod.a": masks["a"]}).shuffled(3)  # compiled, and without the other layer
    assert torch.equal(alone["_orig_mod.a"], shuffled["a"])
    renamed = plp.MaskSet({"c": masks["a"]}).shuffled(3)
    assert not torch.equal(renamed["c"], shuffled["a"])
    # A permutation of entries: the order does not depend on the mask.
    complement = plp.MaskSet({"a": ~masks["a"]}).shuffled(3)
    assert torch.equal(complement["a"], ~shuffled["a"])


@pytest.mark.parametrize("tied", [False, True])
def test_inversion_keeps_the_lowest_scores_of_each_layer(tied):
    scores, masks = problem()
    if tied:
        scores = {name: score.round() for name, score in scores.items()}
        masks = plp.ERK()(scores, 0.8)
    found = inverted(masks, scores)
    for name, score in scores.items():
        kept = masks.counts()[name][0]
        lowest = sorted(range(score.numel()), key=lambda i, s=score: (s.flatten()[i].item(), i))[:kept]
        assert found[name].flatten().nonzero()[:, 0].tolist() == sorted(lowest)
        assert kept > 0


def test_new_weights_have_the_distribution_of_the_old_ones_and_nothing_else_of_them():
    torch.manual_seed(0)
    params = {"a": nn.Parameter(0.3 + 0.02 * torch.randn(200, 100)), "b": nn.Parameter(torch.zeros(5, 4))}
    before = {name: p.detach().clone() for name, p in params.items()}
    state = torch.random.get_rng_state()
    reinitialise_(params, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    a = params["a"].detach()
    assert a.mean().item() == pytest.approx(0.3, abs=5 * 0.02 / 20_000**0.5)
    assert a.std().item() == pytest.approx(0.02, rel=0.03)
    correlation = torch.corrcoef(torch.stack([a.flatten(), before["a"].flatten()]))[0, 1]
    assert abs(correlation.item()) < 5 / 20_000**0.5
    assert torch.equal(params["b"].detach(), before["b"])  # a layer of zeros has no spread
    again = {"a": nn.Parameter(before["a"].clone())}
    reinitialise_(again, seed=1)
    assert torch.equal(again["a"].detach(), a)
    reinitialise_(again, seed=2)
    assert not torch.equal(again["a"].detach(), a)


def test_new_weights_may_be_of_a_named_distribution():
    params = {"a": nn.Parameter(torch.ones(300, 50))}
    reinitialise_(params, "kaiming", seed=1)
    assert params["a"].std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.03)
