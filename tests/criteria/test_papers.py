"""What the cited papers and their code say of themselves, and where they differ from it: docs/papers_and_code.md."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pl_prune as plp
from pl_prune.core.iterate import iterate
from pl_prune.core.probe import Probe

N, CLASSES = 12, 4


def chain(depth: int = 5, bias: bool = False) -> nn.Sequential:
    """A ReLU network of equal layers."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(10, 10, bias=bias), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(10, CLASSES, bias=bias)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 10, generator=generator, dtype=torch.float64), torch.arange(N) % CLASSES


def loss(model, batch, temperature=1.0):
    return nn.functional.cross_entropy(model(batch[0]) / temperature, batch[1])


def flat(scores) -> torch.Tensor:
    return torch.cat([s.flatten() for s in scores.values()])


def overlap(a, b, fraction=0.1) -> float:
    """Intersection over union of the highest scores."""
    kept = [set(s.argsort(descending=True)[: int(fraction * len(s))].tolist()) for s in (a, b)]
    return len(kept[0] & kept[1]) / len(kept[0] | kept[1])


def test_every_layer_has_the_same_first_order_sum_and_the_same_curvature_along_its_weights():
    """In a ReLU network without biases: <w, g> is <f, dL/df>, and w^T H w is f^T (diag p - p p^T) f, at every layer."""
    model = chain()
    for p in model.parameters():
        p.data *= 2  # the curvature of tiny logits would say little
    probe = Probe(model, dict(model.named_parameters()), loss, [batch()])
    x, y = batch()
    f = model(x)
    p = f.softmax(1).detach()
    first = (f * (p - nn.functional.one_hot(y, CLASSES))).sum(1).mean()
    second = ((p * f.square()).sum(1) - (p * f).sum(1).square()).mean()
    grads = probe.grads()
    for name, w in model.named_parameters():
        along = {n: w.detach() if n == name else torch.zeros_like(v) for n, v in model.named_parameters()}
        torch.testing.assert_close((w * grads[name]).sum(), first)
        torch.testing.assert_close((w * probe.hvp(along)[name]).sum(), second)


def test_filters_before_a_batch_norm_in_training_mode_are_orthogonal_to_their_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=1e-12), nn.ReLU(), nn.Flatten(), nn.Linear(36, CLASSES)
    )
    model = model.double()
    batch = torch.randn(N, 2, 5, 5, dtype=torch.float64), torch.arange(N) % CLASSES
    w = model[0].weight
    grad = Probe(model, {"0.weight": w}, loss, [batch]).grads()["0.weight"]
    assert (w * grad).flatten(1).sum(1).abs().max() < 1e-9
    assert grad.abs().max() > 1e-3


def test_a_schedule_on_the_sparsity_empties_layers_where_one_on_the_density_does_not():
    """The published loop removes sparsity^(e / E) in round e, so nearly everything in the first."""
    model, sparsity, rounds = chain(8), 0.9, 20
    probe = Probe(model, plp.Select()(model), loss, [batch()])
    kept, _ = iterate(plp.SynFlow(rounds=rounds), probe, plp.Global(), sparsity)
    assert all(n > 0 for n, _ in kept.counts().values())

    whole = {name: p.detach().clone() for name, p in probe.params.items()}
    for e in range(1, rounds + 1):
        masks = plp.Global()(plp.SynFlow()(probe.fresh()), sparsity ** (e / rounds))
        for name, p in probe.params.items():
            p.data.copy_(whole[name])
        masks.apply_(probe.params)
    assert masks.sparsity() == pytest.approx(kept.sparsity())
    scores = flat(plp.SynFlow()(probe.fresh()))
    assert not scores.any()  # the network that is left passes nothing on; its masks were drawn by ties


def test_at_the_published_temperature_hts_with_an_exact_diagonal_is_snip():
    model = chain()
    exact = plp.GaussNewtonTaylor(estimator="exact", temperature=200.0, taylor_sign="paper")
    hts, snip = (
        flat(plp.score(model, criterion, [batch()], lambda m, b: loss(m, b, 200.0)))
        for criterion in (exact, plp.SNIP())
    )
    assert overlap(hts, snip) == 1
    published = flat(plp.score(model, plp.HutchinsonTaylor(), [batch()], loss))
    assert overlap(published, snip) < 1


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_the_published_diagonal_is_mostly_noise_and_gauss_newton_is_not(temperature):
    model = chain()
    criteria = [
        plp.GaussNewtonDiagonal(estimator="exact", temperature=temperature),
        plp.GaussNewtonDiagonal(temperature=temperature),
        plp.HutchinsonDiagonal(temperature=temperature),
    ]
    exact, sampled, published = (flat(s) for s in plp.score(model, criteria, [batch()], loss))
    assert (exact >= 0).all()
    assert 0.3 < (published < 0).double().mean() < 0.7
    assert (sampled - exact).norm() < 0.7 * exact.norm()
    assert (published - exact).norm() > 3 * exact.norm()
    assert torch.corrcoef(torch.stack([sampled, exact]))[0, 1] > 0.75
    assert torch.corrcoef(torch.stack([published, exact]))[0, 1] < 0.4
