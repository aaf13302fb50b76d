"""Scores of units against explicit masks of a network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import pl_prune as plp
from pl_prune.adversarial.scored_units import ScoredUnits
from pl_prune.adversarial.scores import top_mask


def network() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).double()
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 1.5)
        net[1].bias.uniform_(-0.5, 0.5)
    return net


X = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(6) % 3


def made(net: nn.Module, learner=None, sparsity=0.5, target="groups", state=None) -> ScoredUnits:
    groups = plp.trace_groups(net.eval(), X)
    net.train()
    return ScoredUnits(dict(net.named_parameters()), groups, learner or plp.HYDRA(), sparsity, target, state)


def loss(net: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(net(X), Y)


def test_gradients_are_those_of_one_mask_for_all_slices_of_a_unit():
    net = network()
    whole = {name: p.detach().clone() for name, p in net.named_parameters()}
    scored = made(net)
    masks = {root: keep.double().requires_grad_() for root, keep in scored.keep().items()}
    conv, hidden = masks["0"], masks["4"]
    weights = {
        "4.weight": (whole["4.weight"].view(8, 6, 16) * conv[:, None]).view(8, 96),
        "6.weight": whole["6.weight"] * hidden,
    }
    value = nn.functional.cross_entropy(functional_call(net, weights, (X,)), Y)
    torch.testing.assert_close(value, loss(net))
    expected = torch.autograd.grad(value, [conv, hidden])
    found = scored.score_gradients(
        dict(zip(scored.params, torch.autograd.grad(loss(net), list(scored.params.values())), strict=True))
    )
    for root, e in zip(("0", "4"), expected, strict=True):
        torch.testing.assert_close(found[root], torch.sign(scored.scores[root]) * e)
        assert found[root][~scored.keep()[root]].any(), "units that are out learn too"


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01)]
)
def test_an_optimizer_steps_scores_as_if_they_were_its_own_parameters(make):
    net = network()
    scored = made(net)
    twin = {root: s.clone().requires_grad_() for root, s in scored.scores.items()}
    ours, theirs = make(list(net.parameters())), make(list(twin.values()))
    ours.register_step_post_hook(lambda o, *_: scored.leave(o))
    for _ in range(5):
        ours.zero_grad()
        loss(net).backward()
        grads = scored.score_gradients({name: p.grad for name, p in scored.params.items()})
        for root, s in twin.items():
            s.grad = grads[root]
        for name, p in net.named_parameters():  # the callback lets them stand still
            p.grad = p.grad if name in scored.params or name.startswith("1.") else None
        scored.enter(ours)
        ours.step()
        theirs.step()
        for root, s in twin.items():
            assert torch.equal(scored.scores[root], s.detach()), root
            assert torch.equal(scored.keep()[root], top_mask(s, scored.counts[root]))
        for name, p in net.named_parameters():
            if name in scored.params:
                assert torch.equal(p, scored.weights[name].masked_fill(~scored.kept(name), 0)), name
    assert torch.equal(scored.weights["4.weight"], network()[4].weight), "weights stand still"
    assert torch.equal(net[0].weight, network()[0].weight)
    assert not torch.equal(net[1].weight, network()[1].weight), "norms train"


def test_scores_begin_from_the_norms_of_the_columns_that_consume_a_unit():
    net = network()
    norms = net[4].weight.detach().view(8, 6, 16).square().sum((0, 2)).sqrt()
    torch.testing.assert_close(made(net).scores["0"], math.sqrt(6 / 6) * norms / norms.max())


@pytest.mark.parametrize("target", ["groups", "params", "macs"])
@pytest.mark.parametrize("learner", [plp.HYDRA(), plp.HARP()], ids=lambda x: type(x).__name__)
def test_budgets_are_met_with_no_unit_to_spare(target, learner):
    net = network()
    scored = made(net, learner, 0.5, target)
    if scored.rates is not None:
        with torch.no_grad():
            scored.rates.raw.add_(torch.tensor([0.9, -0.4]))
        scored.put()
    groups = plp.trace_groups(net.eval(), X)
    budget = {"groups": 14, "params": sum(p.numel() for p in net.parameters()), "macs": sum(groups.macs.values())}[
        target
    ]
    budget -= math.floor(budget / 2 + 0.5)

    def cost(keep: dict[str, torch.Tensor]) -> int:
        return (
            sum(int(k.sum()) for k in keep.values())
            if target == "groups"
            else groups.cost(keep)[("params", "macs").index(target)]
        )

    keep = scored.keep()
    assert cost(keep) <= budget
    outputs = net(X)
    masks = scored.settle(dict(net.named_parameters()))
    torch.testing.assert_close(net(X), outputs, rtol=1e-12, atol=1e-12)
    small = plp.shrink(net, masks, X)
    torch.testing.assert_close(small(X), outputs, rtol=1e-12, atol=1e-12)
    if target == "params":
        assert sum(p.numel() for p in small.parameters()) == cost(keep)
    fuller = [
        {**keep, root: k | (torch.arange(len(k)) == int((~k).nonzero()[0]))} for root, k in keep.items() if not k.all()
    ]
    assert any(cost(more) > budget for more in fuller)


def test_a_state_goes_on_where_it_was():
    net = network()
    scored = made(net, plp.HARP())
    with torch.no_grad():
        scored.scores["0"].copy_(torch.tensor([5.0, 0, 4, 1, 2, 3]))
        scored.rates.raw.add_(0.3)
    scored.put()
    other = network()
    again = made(other, plp.HARP(), state=scored.state_dict())
    assert torch.equal(again.scores["0"], scored.scores["0"])
    assert torch.equal(other[4].weight, net[4].weight)
    assert again.counts == scored.counts


def test_what_units_cannot_be_learned_of_is_refused():
    with pytest.raises(plp.PruneError, match="found RLTH"):
        made(network(), plp.RLTH())
    with pytest.raises(plp.PruneError, match=r"at most 0.8571 can go"):
        made(network(), sparsity=0.95)
