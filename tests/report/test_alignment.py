"""The movement of parameters in the eigenbasis of a Hessian."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.testing import assert_close

from pl_prune.core.types import PruneError
from pl_prune.report.alignment import Alignment, alignment, alignment_figure, eigenbasis


class Quadratic(nn.Module):
    """Half of w^T H w with eigenvalues and eigenvectors that are given."""

    values = torch.tensor([3.0, -7.0, 0.5, 0.0, 5.0, -0.1], dtype=torch.float64)

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
        self.a = nn.Parameter(torch.randn(2, 2, generator=generator))
        self.b = nn.Parameter(torch.randn(2, generator=generator))

    def forward(self):
        w = torch.cat([self.a.flatten(), self.b])
        return 0.5 * w @ (self.vectors @ self.values.diag() @ self.vectors.T) @ w


def quadratic_loss(model, batch):
    return model() * batch[0].mean()


BATCHES = [(torch.ones(3),), (torch.full((1,), 2.0),)]
"""Their mean over samples is 5/4."""


@pytest.fixture
def quadratic():
    return Quadratic()


def params_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_eigenvalues_and_eigenvectors_of_a_quadratic(quadratic):
    before = {name: p.clone() for name, p in quadratic.named_parameters()}
    values, vectors = eigenbasis(quadratic, quadratic_loss, BATCHES)
    order = [1, 4, 0, 2, 5, 3]
    assert_close(values, 1.25 * Quadratic.values[order], atol=1e-12, rtol=1e-12)
    assert_close((vectors * quadratic.vectors[:, order]).sum(0).abs(), torch.ones(6, dtype=torch.float64))
    assert all(torch.equal(p, before[name]) for name, p in quadratic.named_parameters())
    assert next(quadratic.parameters()).dtype == torch.float32


def test_a_movement_along_two_eigenvectors_is_found_there(quadratic):
    basis = eigenbasis(quadratic, quadratic_loss, BATCHES)
    before = params_of(quadratic)
    moved = 3 * quadratic.vectors[:, 4] + 4 * quadratic.vectors[:, 3]
    after = {"a": before["a"].double() + moved[:4].view(2, 2), "b": before["b"].double() + moved[4:]}
    found = alignment(basis, before, after)
    assert_close(found.squares, torch.tensor([0, 9.0, 0, 0, 0, 16], dtype=torch.float64), atol=1e-9, rtol=1e-9)
    assert found.share(1) == pytest.approx(0, abs=1e-9)
    assert found.share(2) == pytest.approx(9 / 25)
    assert found.share(6) == pytest.approx(1)
    assert found.curved == 5


def test_the_hessian_of_a_network_is_that_of_torch_func():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, dtype=torch.float64)

    def loss_fn(model, batch):
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])

    shapes = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]

    def loss(flat):
        parts = flat.split([n for *_, n in shapes])
        params = {name: part.view(shape) for (name, shape, _), part in zip(shapes, parts, strict=True)}
        logits = functional_call(model, params, (x,))[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, y)

    exact = hessian(loss)(torch.cat([p.detach().flatten() for p in model.parameters()]))
    values, vectors = eigenbasis(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert_close(vectors @ values.diag() @ vectors.T, exact, atol=1e-12, rtol=1e-9)
    assert list(values.abs()) == sorted(values.abs(), reverse=True)


def test_rank_correlation_looks_at_curved_directions_alone():
    values = torch.tensor([4.0, -3.0, 2.0, 0.0, 0.0])
    assert Alignment(values, torch.tensor([9.0, 5.0, 1.0, 100.0, 0.0])).correlation() == pytest.approx(1)
    assert Alignment(values, torch.tensor([1.0, 5.0, 9.0, 100.0, 0.0])).correlation() == pytest.approx(-1)
    still = Alignment(values, torch.zeros(5))
    assert still.share(3) == 0
    assert still.correlation() != still.correlation()
    assert Alignment(torch.ones(1), torch.ones(1)).correlation() != 1


def test_the_picture_says_how_much_lies_along_the_first(quadratic):
    squares = torch.tensor([50.0, 30.0, 20.0] + [0.0] * 997)
    values = torch.tensor([-9.0, 5.0, 1.0] + [1e-3] * 7 + [0.0] * 990)
    picture = alignment_figure({
        "first step": Alignment(values, squares.flip(0)),
        "epoch 5": Alignment(values, squares),
    })
    assert picture.png.startswith(b"\x89PNG")
    assert "100.0 % of the squared movement (epoch 5) lies along the 10 eigenvectors" in picture.caption
    assert "of 1,000, of which 10 are curved; a random direction would have 1 %" in picture.caption


def test_what_cannot_be_decomposed_is_refused(quadratic):
    with pytest.raises(PruneError, match="found 20,100 parameters"):
        eigenbasis(nn.Linear(200, 100), quadratic_loss, BATCHES)
    with pytest.raises(PruneError, match="found no batches"):
        eigenbasis(quadratic, quadratic_loss, [])
    basis = eigenbasis(quadratic, quadratic_loss, BATCHES)
    before = params_of(quadratic)
    with pytest.raises(PruneError, match=r"Expected the 6 parameters .* found 6 and 4"):
        alignment(basis, before, {"a": copy.deepcopy(before["a"])})
