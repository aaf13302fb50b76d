"""Score learners against their formulas: beginnings, counts, masks and straight-through gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import pl_prune as plp
from pl_prune.adversarial.scored import ScoredWeights
from pl_prune.adversarial.scores import proportional, top_mask


class Subnet(torch.autograd.Function):
    """The straight-through estimator as it is published: a 0/1 mask forward, the identity backward."""

    @staticmethod
    def forward(ctx, scores, keep):
        order = torch.argsort(scores.flatten(), descending=True, stable=True)
        mask = torch.zeros_like(scores).flatten()
        mask[order[:keep]] = 1
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def network() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return net.double()


def loss_of(net: nn.Module, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    return nn.functional.cross_entropy(functional_call(net, weights, (x,)), torch.arange(6) % 3)


def selected(net: nn.Module) -> dict[str, nn.Parameter]:
    return plp.Select(output_layer=True)(net)


@pytest.mark.parametrize("learner", [plp.HYDRA(), plp.HARP(), plp.RLTH()], ids=lambda learner: type(learner).__name__)
def test_the_gradient_of_scores_is_that_of_the_straight_through_estimator(learner):
    net = network()
    params = selected(net)
    scored = ScoredWeights(params, learner, 0.7, seed=5)
    scores = {name: s.clone().requires_grad_() for name, s in scored.scores.items()}
    weights = {name: scored.weights[name] * Subnet.apply(s.abs(), scored.counts[name]) for name, s in scores.items()}
    expected = torch.autograd.grad(loss_of(net, weights), list(scores.values()))

    for name, p in params.items():
        torch.testing.assert_close(p.detach(), weights[name].detach(), rtol=0, atol=0)
    found = torch.autograd.grad(loss_of(net, dict(params)), list(params.values()))
    for (name, g), e in zip(zip(params, found, strict=True), expected, strict=True):
        torch.testing.assert_close(scored.score_gradient(name, g), e, rtol=1e-14, atol=0)
        assert scored.score_gradient(name, g)[~scored.kept(name)].any(), "pruned entries learn too"


def test_hydra_begins_from_the_pretrained_weights():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    w0, s = plp.HYDRA().begin("conv.weight", weight, 0)
    torch.testing.assert_close(s, math.sqrt(6 / 27) * weight / weight.abs().max(), rtol=1e-15, atol=0)
    assert torch.equal(w0, weight)
    assert w0.data_ptr() != weight.data_ptr()
    assert torch.equal(top_mask(s, 40), top_mask(weight, 40)), "the first mask is that of the largest weights"


def test_hydra_begins_from_zeros_without_a_number_that_is_none():
    _, s = plp.HYDRA().begin("w", torch.zeros(3, 2), 0)
    assert torch.equal(s, torch.zeros(3, 2))


def test_rlth_draws_weights_of_one_size_and_its_own_scores():
    weight = torch.zeros(40, 9)
    w0, s = plp.RLTH().begin("fc.weight", weight, 3)
    torch.testing.assert_close(w0.abs(), torch.full_like(w0, math.sqrt(2 / 9)))
    assert 120 < int((w0 > 0).sum()) < 240
    assert float(s.abs().max()) <= 1 / 3
    assert torch.equal(s, plp.RLTH().begin("fc.weight", weight, 3)[1])
    assert not torch.equal(s, plp.RLTH().begin("fc.weight", weight, 4)[1])
    assert not torch.equal(s, plp.RLTH().begin("other.weight", weight, 3)[1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@given(keep=st.integers(1, 96), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_masks_are_exact_in_every_memory_format(memory_format, keep, seed):
    scores = torch.randint(
        -3, 4, (4, 3, 2, 4), generator=torch.Generator().manual_seed(seed)
    ).double()  # with many ties
    mask = top_mask(scores.contiguous(memory_format=memory_format), keep)
    order = sorted(range(96), key=lambda i: (-abs(float(scores.flatten()[i])), i))
    expected = torch.zeros(96, dtype=torch.bool)
    expected[order[:keep]] = True
    assert torch.equal(mask, expected.view(scores.shape))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    densities=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    data=st.data(),
)
@settings(deadline=None)
def test_counts_are_the_nearest_to_their_shares(sizes, densities, data):
    keep = data.draw(st.integers(len(sizes), sum(sizes)))
    names = {str(i): n for i, n in enumerate(sizes)}
    shares = dict(zip(names, densities, strict=False))
    found = proportional(names, shares, keep)
    assert sum(found.values()) == keep
    assert all(1 <= found[name] <= n for name, n in names.items())
    every = itertools.product(*(range(1, n + 1) for n in sizes))
    best = min(spread(c, names, shares) for c in every if sum(c) == keep)
    assert spread(tuple(found.values()), names, shares) <= best + 1.0 + 1e-9


def spread(counts: tuple[int, ...], sizes: dict[str, int], shares: dict[str, float]) -> float:
    """How far counts are from shares that are capped by one and the layer, with the scale that suits them best."""
    low, high = 0.0, 1e6
    for _ in range(80):
        scale = (low + high) / 2
        wanted = [min(max(1.0, shares[name] * n * scale), float(n)) for name, n in sizes.items()]
        low, high = (scale, high) if sum(wanted) < sum(counts) else (low, scale)
    return max(abs(c - w) for c, w in zip(counts, wanted, strict=True))


def test_counts_of_hydra_are_exact_together_or_as_published():
    sizes = {"a": 27, "b": 1000, "c": 64}
    exact = plp.HYDRA().counts(sizes, 0.9)
    assert sum(exact.values()) == 1091 - math.floor(0.9 * 1091 + 0.5)
    published = plp.HYDRA(rounding="published").counts(sizes, 0.9)
    assert published == {"a": 27 - 24, "b": 100, "c": 64 - 57}


def test_a_sparsity_that_leaves_a_layer_empty_is_refused():
    with pytest.raises(plp.PruneError, match=r"leaves every layer an entry; found 0.995, which leaves 1 for 2"):
        ScoredWeights(selected(network()), plp.HYDRA(), 0.995)


def test_low_precision_is_refused():
    net = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 2))
    with pytest.raises(plp.PruneError, match=r"'0.weight' of torch.bfloat16"):
        ScoredWeights(selected(net), plp.HYDRA(), 0.5)


def test_scores_of_another_network_are_refused():
    state = ScoredWeights(selected(network()), plp.HYDRA(), 0.5).state_dict()
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(plp.PruneError, match="this network's parameters"):
        ScoredWeights(selected(other), plp.HYDRA(), 0.5, state=state)


def test_memory_is_nine_bytes_an_entry():
    net = network().float()
    scored = ScoredWeights(selected(net), plp.HYDRA(), 0.7)
    held = [*scored.weights.values(), *scored.scores.values(), *scored._marks.values()]
    assert sum(t.numel() * t.element_size() for t in held) == 9 * sum(p.numel() for p in scored.params.values())


@pytest.mark.parametrize("start", ["uniform", "erk"])
def test_harps_densities_begin_where_they_are_told_and_learn_by_their_formula(start):
    net = network()
    params = selected(net)
    learner = plp.HARP(start=start, weight=0.5)
    scored = ScoredWeights(params, learner, 0.7)
    rates = scored.rates
    sizes = {name: p.numel() for name, p in params.items()}
    keep = sum(sizes.values()) - round(0.7 * sum(sizes.values()))
    shares = {name: sum(p.shape) / p.numel() if start == "erk" else 1.0 for name, p in params.items()}
    begin = proportional(sizes, shares, keep)
    expected = torch.tensor([min(begin[name] / n, 0.99) for name, n in sizes.items()], dtype=torch.float64)
    torch.testing.assert_close(rates.densities().detach(), expected)
    assert sum(scored.counts.values()) == keep

    with torch.no_grad():
        rates.raw.add_(torch.tensor([0.4, 0.3]))  # beyond the budget
    rates.begin_epoch(2)  # whose number makes the factor 3
    raw = rates.raw.detach().clone().requires_grad_()
    k_min = 0.1 * rates.density
    k = torch.sigmoid(raw) * (1 - k_min) + k_min
    n = torch.tensor(list(sizes.values()), dtype=torch.float64)
    over = (n * k).sum() / (rates.density * n.sum()) - 1
    assert float(over.detach()) > 0
    slope = torch.tensor([0.2, -0.7], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((slope * k).sum() + 3 * 0.5 * over, raw)
    optimizer = torch.optim.SGD(params.values(), lr=0.1, weight_decay=0.01)
    rates.step({name: slope[i] for i, name in enumerate(sizes)}, optimizer)
    torch.testing.assert_close(rates.raw.detach(), raw.detach() - 0.1 * (gradient + 0.01 * raw.detach()))


def test_harps_factor_stops_growing_once_the_budget_holds():
    rates = ScoredWeights(selected(network()), plp.HARP(weight=0.01), 0.7).rates
    with torch.no_grad():
        rates.raw.add_(0.5)
    factors = []
    for epoch in range(5):
        rates.begin_epoch(epoch)
        factors.append(round(rates._factor, 6))
        if epoch == 2:
            with torch.no_grad():
                rates.raw.sub_(1)
    assert factors == [0.01, 0.02, 0.03, 0.03, 0.03]
    assert not rates.growing
    again = ScoredWeights(selected(network()), plp.HARP(weight=0.01), 0.7).rates
    again.load_state_dict(rates.state_dict())
    assert torch.equal(again.raw, rates.raw)
    assert not again.growing


def test_harps_layers_learn_by_the_sum_over_their_masks():
    net = network()
    params = selected(net)
    scored = ScoredWeights(params, plp.HARP(), 0.7)
    masks = {name: scored.kept(name).double().requires_grad_() for name in params}
    weights = {name: scored.weights[name] * mask for name, mask in masks.items()}
    expected = [g.sum() for g in torch.autograd.grad(loss_of(net, weights), list(masks.values()))]
    for p, g in zip(
        params.values(), torch.autograd.grad(loss_of(net, dict(params)), list(params.values())), strict=True
    ):
        p.grad = g
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    scored.enter(optimizer)
    torch.testing.assert_close(torch.stack(list(scored._entered.values())), torch.stack(expected))
    scored.undo()
    assert torch.equal(params["0.weight"], scored.kept_weights()["0.weight"])


@pytest.mark.parametrize("bad", [{"least": 0}, {"least": 1}, {"weight": -1}, {"start": "dense"}])
def test_harp_says_what_is_wrong(bad):
    with pytest.raises(plp.PruneError, match=r"Expected (least|weight|start)"):
        plp.HARP(**bad)
