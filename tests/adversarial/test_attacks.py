from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from fingerprint import fingerprint
from linear_model import Linear, images, network
from refusal import expect_refusal
from torch.nn.functional import cross_entropy

import pl_prune as plp
from pl_prune.adversarial.attacks import random_in_ball

EPS = 0.08


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths(moved, x, norm):
    away = (moved - x).flatten(1)
    return away.abs().amax(1) if norm == "linf" else away.norm(dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "attack",
    [
        lambda norm: plp.PGD(EPS, EPS / 4, 5, norm),
        lambda norm: plp.PGD(EPS, EPS, 1, norm, start="noise"),
        lambda norm: plp.PGD(EPS, EPS / 4, 5, norm, start="image"),
        lambda norm: plp.TRADES(EPS, EPS / 4, 5, norm=norm).examples,
        lambda norm: plp.PGDAT(EPS, EPS / 4, 5, norm=norm).examples,
        lambda norm: plp.FastAT(EPS, 2 * EPS, norm=norm).examples,
    ],
    ids=["uniform", "noise", "image", "TRADES", "PGDAT", "FastAT"],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_examples_lie_in_the_ball_and_the_box(attack, norm, kind):
    x, y = images(kind=kind)
    moved = attack(norm)(network().to(kind), x, y, seeded())
    assert moved.dtype == kind
    assert not moved.requires_grad
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    far = lengths(moved, x, norm)
    assert float(far.max()) <= EPS * (1 + (1e-5 if kind == torch.float32 else 1e-12))
    assert float(far.min()) > 0.1 * EPS


def by_hand(net, x, y, eps, step, steps, norm):
    """Projected gradient ascent from the image itself, pixel by pixel and image by image."""
    moved = x.clone()
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        cross_entropy(net(moved), y, reduction="sum").backward()
        new = torch.empty_like(x)
        for i, g in enumerate(moved.grad):
            if norm == "linf":
                new[i] = moved[i].detach() + step * g.sign()
                new[i] = torch.min(torch.max(new[i], x[i] - eps), x[i] + eps)
            else:
                away = moved[i].detach() + step * g / g.pow(2).sum().sqrt() - x[i]
                new[i] = x[i] + away * min(1.0, eps / float(away.pow(2).sum().sqrt()))
        moved = new.clamp(0, 1)
    return moved


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_projected_gradient_ascent(norm):
    x, y = images()
    net = network()
    found = plp.PGD(EPS, EPS / 3, 6, norm, start="image")(net.train(), x, y)
    torch.testing.assert_close(found, by_hand(net.eval(), x, y, EPS, EPS / 3, 6, norm), rtol=0, atol=1e-12)


def test_one_long_step_is_the_worst_case_of_a_linear_model():
    model = Linear(classes=2).double()
    x, y = images(classes=2)
    moved = plp.PGD(EPS, EPS, 1, start="image")(model, x, y)
    assert torch.equal(model(moved).argmax(1) == y, model.stands(x, y, EPS))


def test_attacks_leave_no_trace():
    net = network()
    net[1].eval()  # a part that the user froze
    x, y = images()
    cross_entropy(net(x), y).backward()
    before = fingerprint(net)
    for attack in (plp.PGD(EPS, EPS, 2), plp.TRADES(EPS, EPS, 2).examples, plp.FastAT(EPS, EPS).examples):
        attack(net, x, y, seeded())
        assert fingerprint(net) == before
    with expect_refusal("classes"):
        plp.TRADES().examples(net, x, y + 7)
    assert fingerprint(net) == before


def test_the_generator_alone_decides_the_start():
    x, y = images()
    runs = [plp.PGD(EPS, EPS, 1)(network(), x, y, seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_uniform_in_the_ball(norm):
    x = torch.zeros(20000, 1, 2, 1)
    drawn = random_in_ball(x, 0.5, norm, seeded())
    radius = lengths(drawn, x, norm) / 0.5
    assert float(radius.max()) <= 1
    for share in (0.25, 0.5, 0.75):  # of a square or a disc, the share of area within a radius
        assert float((radius < share).float().mean()) == pytest.approx(share**2, abs=0.02)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: plp.PGD(eps=0), ("eps in (0, 1]", "found 0")),
        (lambda: plp.TRADES(eps=8), ("eps in (0, 1]", "8/255")),
        (lambda: plp.PGDAT(eps=-0.1), ("found -0.1",)),
        (lambda: plp.FastAT(eps=float("nan")), ("found nan",)),
        (lambda: plp.PGD(eps=0, norm="l2"), ("above 0",)),
        (lambda: plp.TRADES(eps=0.01, step_size=0.02), ("step size of at most eps = 0.01", "found 0.02")),
        (lambda: plp.FastAT(eps=0.01, step_size=0.03), ("at most 2 eps", "found 0.03")),
        (lambda: plp.PGDAT(step_size=0), ("step_size to be positive",)),
        (lambda: plp.PGD(steps=0), ("steps", "found 0")),
        (lambda: plp.PGD(norm="linfty"), ("norm", "'linf', 'l2'")),
        (lambda: plp.PGD(start="zero"), ("start", "'zero'")),
        (lambda: plp.TRADES(beta=-1), ("beta of 0 or more",)),
    ],
)
def test_bad_settings_are_refused(make, parts):
    with expect_refusal(*parts):
        make()


X, Y = images()


@pytest.mark.parametrize(
    ("model", "x", "y", "parts"),
    [
        (network(), X * 2 - 1, Y, ("images in [0, 1]", "from -1 to 1", "NormalizedModel")),
        (network(), X.where(X < 0.9, float("nan")), Y, ("images in [0, 1]", "nan")),
        (network(), (X * 255).byte(), Y, ("floating-point", "uint8")),
        (network(), X, Y + 1, ("labels from 0 to 3", "found 4")),
        (network(), X, Y - 1, ("labels of 0 or more", "found -1")),
        (network(), X, nn.functional.one_hot(Y).double(), ("class index for each of 12", "mixup")),
        (network(), X, Y[:5], ("(5,)",)),
        (network()[:2], X, Y, ("logits (12, classes)", "found shape (12, 6, 6, 6)")),
        (nn.LSTM(6, 4).double(), X[:, 0], Y, ("found tuple",)),
    ],
)
def test_bad_batches_are_refused(model, x, y, parts):
    for attack in (plp.PGD(), plp.TRADES().examples, plp.FastAT().examples):
        with expect_refusal(*parts):
            attack(model, x, y)


def test_a_normalized_model_standardises():
    model = plp.NormalizedModel(nn.Identity(), mean=[0.5, 0.2], std=[0.25, 0.1])
    x = torch.rand(3, 2, 4, 4)
    torch.testing.assert_close(model(x)[:, 1], (x[:, 1] - 0.2) / 0.1)
    assert set(model.state_dict()) == {"mean", "std"}
    with expect_refusal("2 channels", "(3, 1, 4, 4)"):
        model(x[:, :1])
    with expect_refusal("positive std", "0.0"):
        plp.NormalizedModel(nn.Identity(), mean=[0.5], std=[0.0])
    with expect_refusal("for each channel"):
        plp.NormalizedModel(nn.Identity(), mean=[0.5, 0.5], std=[0.1])
