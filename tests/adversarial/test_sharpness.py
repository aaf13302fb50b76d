"""Sharpness in the space of scores against explicit Hessians and enumerated masks, and the distance of masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_model import images, network
from torch import nn
from torch.func import functional_call, hessian

import pl_prune as plp
from pl_prune.adversarial.scored import ScoredWeights
from pl_prune.adversarial.sharpness import largest_eigenvalue, loss_difference, mask_stability
from pl_prune.core.hessian import hessian_products
from pl_prune.core.masks import MaskSet

INPUTS = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).double() + 1


def smooth(sparsity: float = 0.6) -> tuple[nn.Module, ScoredWeights]:
    """62 scores of a smooth network, and their weights."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 6, bias=False)).double()
    return net, ScoredWeights(plp.Select(output_layer=True)(net), plp.HYDRA(), sparsity)


def loss_of(net: nn.Module, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    return nn.functional.cross_entropy(functional_call(net, weights or {}, (INPUTS,)), torch.arange(20) % 6)


def flat(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts.values()])


def explicit(net: nn.Module, scored: ScoredWeights) -> torch.Tensor:
    """D H D: the Hessian of the weights in use, entry by entry, between the slopes of w with respect to s."""
    names = list(scored.params)
    sizes = [scored.params[n].numel() for n in names]
    at = torch.cat([scored.params[n].detach().flatten() for n in names])

    def of(flat):
        parts = flat.split(sizes)
        return loss_of(net, {n: part.view(scored.params[n].shape) for n, part in zip(names, parts, strict=True)})

    d = torch.cat([(scored.weights[n] * torch.sign(scored.scores[n])).flatten() for n in names])
    return d[:, None] * hessian(of)(at).detach() * d


def test_products_are_those_of_the_straight_through_hessian():
    net, scored = smooth()
    straight = explicit(net, scored)
    v = {name: torch.randn_like(s) for name, s in scored.scores.items()}
    swapped = list(scored.score_gradients(v).values())
    (product,) = hessian_products(lambda: loss_of(net), list(scored.params.values()), [swapped])
    found = scored.score_gradients(dict(zip(v, product, strict=True)))
    torch.testing.assert_close(flat(found), straight @ flat(v))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_eigenvalue_is_that_of_the_explicit_hessian(sign):
    net, scored = smooth()
    values = torch.linalg.eigvalsh(sign * explicit(net, scored))
    largest = max(values, key=abs)
    second = sorted(values.abs())[-2]
    assert len(values) == 62
    assert second < 0.75 * abs(largest), "a gap, without which ten iterations do not tell the two apart"
    found = largest_eigenvalue(scored, lambda: sign * loss_of(net), iterations=10)
    assert found == pytest.approx(float(largest), rel=0.01)
    assert found * sign > 0
    again = largest_eigenvalue(scored, lambda: sign * loss_of(net), iterations=100, seed=1)
    assert again == pytest.approx(float(largest), rel=1e-9)


def test_a_loss_without_curvature_has_the_eigenvalue_zero():
    net, scored = smooth()
    weight = net[0].weight
    assert largest_eigenvalue(scored, lambda: (weight * 3).sum()) == 0
    assert largest_eigenvalue(scored, lambda: (weight * 0).sum() ** 2) == 0


def few(seed: int, sparsity: float = 0.5) -> tuple[nn.Module, ScoredWeights]:
    torch.manual_seed(seed)
    net = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(2, 4).sign() * (1 + 0.1 * torch.rand(2, 4)))
    return net, ScoredWeights({"weight": net.weight}, plp.HYDRA(), sparsity)


def enumerated(scored: ScoredWeights, loss, rho: float) -> float:
    """The largest rise over all masks that a move within the radius can make."""
    s, w0 = scored.scores["weight"].abs().flatten(), scored.weights["weight"]
    start, rises = float(loss().detach()), []
    for chosen in itertools.combinations(range(len(s)), scored.counts["weight"]):
        keep = torch.zeros(len(s), dtype=torch.bool)
        keep[list(chosen)] = True
        if s[keep].min() * (1 + rho) > s[~keep].max() * (1 - rho):
            with torch.no_grad():
                scored.params["weight"].copy_(w0 * keep.view_as(w0))
                rises.append(float(loss()) - start)
    scored.put()
    return max(rises)


@pytest.mark.parametrize("rho", [0.005, 0.03, 0.2])
def test_the_loss_difference_is_the_largest_over_all_masks_within_reach(rho):
    rises = []
    for seed in range(20):
        net, scored = few(seed)
        slope = torch.randn(2, 4).sign() / scored.weights["weight"]  # every weight in use changes the loss by one
        loss = lambda net=net, slope=slope: (net.weight * slope).sum()  # noqa: E731
        rises.append(enumerated(scored, loss, rho))
        assert loss_difference(scored, loss, rho) == pytest.approx(rises[-1], abs=1e-12)
    assert sum(rise > 0 for rise in rises) >= 3, "not all of them flat"


@given(seed=st.integers(0, 10_000), rho=st.sampled_from([0.001, 0.02, 0.1]), iterations=st.integers(1, 25))
@settings(deadline=None, max_examples=40)
def test_the_loss_difference_lies_between_zero_and_the_largest(seed, rho, iterations):
    net, scored = few(seed)
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 2
    loss = lambda: nn.functional.cross_entropy(net(x), y)  # noqa: E731
    found = loss_difference(scored, loss, rho, iterations)
    assert 0 <= found <= enumerated(scored, loss, rho) + 1e-12


class Failing(Exception):
    pass


@pytest.mark.parametrize("fails_at", [None, 1, 9])
def test_moves_stay_in_the_ball_and_the_network_is_as_it_was(monkeypatch, fails_at):
    net = network().eval()
    x, y = images()
    scored = ScoredWeights(plp.Select(output_layer=True)(net), plp.HARP(), 0.8)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    scores = {name: s.clone() for name, s in scored.scores.items()}
    masks, put, far = scored.masks(), scored.put, []

    def watched(moves=None):
        for name, move in (moves or {}).items():
            assert (move.abs() <= 0.05 * scored.scores[name].abs() * (1 + 1e-12)).all()
            far.append(float((move / scored.scores[name]).abs().max()))
        put(moves)

    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise Failing
        return nn.functional.cross_entropy(net(x), y)

    monkeypatch.setattr(scored, "put", watched)
    if fails_at is None:
        assert loss_difference(scored, loss, 0.05) > 0
        assert calls == 21
        assert max(far) == pytest.approx(0.05)
    else:
        with pytest.raises(Failing):
            loss_difference(scored, loss, 0.05)
    assert not scored.moved
    assert all(torch.equal(net.state_dict()[name], t) for name, t in before.items())
    assert all(torch.equal(scored.scores[name], s) for name, s in scores.items())
    assert scored.masks() == masks
    assert all(p.grad is None for p in net.parameters())


def masks_of(*keep: list[bool]) -> MaskSet:
    return MaskSet({str(i): torch.tensor(k) for i, k in enumerate(keep)})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_the_distance_of_masks_is_that_of_hamming(pairs):
    one, two = ([pair[side] for pair in pairs] for side in (0, 1))
    found, of_kept = mask_stability(masks_of(one, one), masks_of(two, one))
    apart, kept = sum(a != b for a, b in pairs), 3 * sum(one) + sum(two)
    assert found == pytest.approx(apart / (2 * len(pairs)))
    assert of_kept == pytest.approx(apart / kept if kept else 0.0)
    assert mask_stability(masks_of(two, one), masks_of(one, one)) == (found, of_kept)
    assert mask_stability(masks_of(one), masks_of(one)) == (0.0, 0.0)


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_the_distance_is_bounded_by_what_is_kept_and_what_is_not(k):
    p = 8
    ends = masks_of([i < k for i in range(p)]), masks_of([i >= p - k for i in range(p)])  # as far apart as can be
    found, of_kept = mask_stability(*ends)
    assert found == pytest.approx(2 * min(k, p - k) / p)
    assert of_kept == pytest.approx(min(k, p - k) / k)
