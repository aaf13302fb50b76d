"""Norms with a weight decay and a momentum of their own, against the update written out."""

from __future__ import annotations

import copy

import pytest
import torch
from refusal import expect_refusal
from torch import nn

from pl_prune.models import NormSGD


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).double()


def grads(model, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


@pytest.mark.parametrize("momentum", [None, 0.0])
def test_every_step_is_the_formula(momentum):
    model = network()
    expected = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    optimizer = NormSGD(model.parameters(), 0.1, 0.9, 1e-2, norm_weight_decay=5e-3, norm_momentum=momentum)
    for step in range(4):
        for p, g in zip(model.parameters(), grads(model, step), strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i, g in enumerate(grads(model, step)):
            vector = expected[i].ndim == 1
            decay = 5e-3 if vector else 1e-2
            keep = momentum if vector and momentum is not None else 0.9
            velocity[i] = keep * velocity[i] + g + decay * expected[i]
            expected[i] = expected[i] - 0.1 * velocity[i]
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected, rtol=1e-13, atol=0)


def test_without_settings_of_their_own_it_is_sgd():
    ours, theirs = network(), network()
    pair = (
        NormSGD(ours.parameters(), 0.1, 0.9, 1e-2),
        torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-2),
    )
    for step in range(3):
        for model, optimizer in zip((ours, theirs), pair, strict=True):
            for p, g in zip(model.parameters(), grads(model, step), strict=True):
                p.grad = g
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_schedules_reach_both_groups_and_state_is_restored():
    model = network()
    optimizer = NormSGD(model.parameters(), 0.1, 0.9, norm_weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 0.01])
    again = NormSGD(copy.deepcopy(model).parameters(), 0.5, norm_weight_decay=1.0)
    again.load_state_dict(optimizer.state_dict())
    assert [g["weight_decay"] for g in again.param_groups] == [0.0, 0.0]
    assert [g["lr"] for g in again.param_groups] == pytest.approx([0.01, 0.01])


def test_a_network_of_one_kind_of_parameter_has_one_group():
    assert len(NormSGD([nn.Parameter(torch.ones(2, 2))], 0.1).param_groups) == 1
    assert len(NormSGD([nn.Parameter(torch.ones(2))], 0.1).param_groups) == 1


def test_bad_settings_are_refused():
    p = nn.Parameter(torch.ones(2))
    with expect_refusal("norm_weight_decay", "found -1"):
        NormSGD([p], 0.1, norm_weight_decay=-1)
    with expect_refusal("norm_momentum", "found -0.5"):
        NormSGD([p], 0.1, norm_momentum=-0.5)
    with expect_refusal("parameters", "found dict"):
        NormSGD([{"params": [p]}], 0.1)
