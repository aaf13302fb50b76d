from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

sys.path.insert(0, str(Path(__file__).parent))
from linear_model import images, network

import pl_prune as plp

EPS, STEP, STEPS, BETA = 0.08, 0.03, 4, 6.0


def divergence(model, moved, x):
    """KL(p(x) || p(x')), summed over the batch, with the clean logits computed anew."""
    p = softmax(model(x), 1)
    return (p * (p.log() - log_softmax(model(moved), 1))).sum()


def published_examples(model, x, noise):
    moved = x + noise
    for _ in range(STEPS):
        moved = moved.detach().requires_grad_()
        (g,) = torch.autograd.grad(divergence(model.eval(), moved, x), moved)
        moved = moved.detach() + STEP * g.sign()
        moved = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
    return moved.detach()


def published_loss(model, x, y, moved):
    return cross_entropy(model(x), y) + BETA * divergence(model, moved, x) / len(x)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_trades_is_the_published_formula(train):
    x, y = images()
    noise = torch.empty_like(x).normal_(std=0.001, generator=torch.Generator().manual_seed(4))
    theirs, ours = network(), network()
    moved = published_examples(theirs, x, noise)
    theirs.train(train)
    expected = published_loss(theirs, x, y, moved)
    expected.backward()

    loss = plp.TRADES(EPS, STEP, STEPS, BETA)
    found_moved = loss.examples(ours.train(train), x, y, torch.Generator().manual_seed(4))
    assert ours.training == train
    found = loss(ours, x, y, found_moved)
    found.backward()
    torch.testing.assert_close(found_moved, moved, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = network(), []

    def forward(self, x):
        self.seen.append((self.training, torch.equal(x, images()[0])))
        return self.net(x)


def test_trades_runs_the_images_once_for_the_attack_and_once_for_the_loss():
    model = Counting()
    x, y = images()
    loss = plp.TRADES(EPS, STEP, STEPS)
    loss(model, x, y, loss.examples(model, x, y))
    assert model.seen == [(False, True)] + STEPS * [(False, False)] + [(True, True), (True, False)]


def test_trades_without_a_weight_is_cross_entropy():
    x, y = images()
    loss, net = plp.TRADES(EPS, STEP, STEPS, beta=0), network().eval()
    torch.testing.assert_close(loss(net, x, y, loss.examples(net, x, y)), cross_entropy(net(x), y))


def test_the_divergence_is_finite_where_a_probability_vanishes():
    clean = torch.tensor([[2000.0, 0.0]], requires_grad=True)
    adversarial = torch.tensor([[0.0, 2000.0]], requires_grad=True)
    plp.TRADES().penalty(clean, adversarial).backward()
    assert bool(clean.grad.isfinite().all())
    assert bool(adversarial.grad.isfinite().all())


@pytest.mark.parametrize("loss", [plp.PGDAT(EPS, STEP, STEPS), plp.FastAT(EPS, 1.25 * EPS), plp.CrossEntropy()])
def test_the_others_are_cross_entropy_of_their_examples(loss):
    x, y = images()
    net = network().eval()
    moved = loss.examples(net, x, y, torch.Generator().manual_seed(1))
    assert torch.equal(loss(net, x, y, moved), cross_entropy(net(moved), y))
    assert torch.equal(moved, x) == isinstance(loss, plp.CrossEntropy)
    gain = cross_entropy(net(moved), y) - cross_entropy(net(x), y)
    assert gain > 0 or isinstance(loss, plp.CrossEntropy)


def test_fast_training_is_one_step_from_a_random_start():
    x, y = images()
    net = network().eval()
    start = torch.empty_like(x).uniform_(-EPS, EPS, generator=torch.Generator().manual_seed(1))
    start = (x + start).clamp(0, 1).requires_grad_()
    cross_entropy(net(start), y, reduction="sum").backward()
    moved = start.detach() + 1.25 * EPS * start.grad.sign()
    expected = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
    found = plp.FastAT(EPS, 1.25 * EPS).examples(net, x, y, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [plp.TRADES(), plp.PGDAT(), plp.FastAT(), plp.CrossEntropy()])
def test_losses_are_values(loss):
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert hash(loss) == hash(type(loss)())
