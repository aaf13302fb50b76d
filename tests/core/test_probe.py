from __future__ import annotations

import pytest
import torch
from fingerprint import fingerprint
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core.probe import Probe, batch_size


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(n=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 3


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(*sizes, dtype=torch.float64):
    x, y = data(sum(sizes), dtype)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def weights(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("weight")}


def test_gradient_of_the_mean_by_finite_differences():
    model = network()
    found = Probe(model, weights(model), loss, batches(3, 3, 1)).grads()
    step = 1e-6
    for name, parameter in weights(model).items():
        expected = torch.zeros_like(parameter)
        for i in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * step
                    values.append(float(loss(model, data())))
                    parameter.view(-1)[i] -= sign * step
            expected.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cut", [(1, 6), (2, 2, 2, 1), (1,) * 7])
def test_the_cut_into_batches_does_not_matter(cut):
    model = network()
    whole = Probe(model, weights(model), loss, batches(7)).grads()
    for name, grad in Probe(model, weights(model), loss, batches(*cut)).grads().items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_precision_of_the_result(dtype, result):
    model = network(dtype)
    grads = Probe(model, weights(model), loss, batches(4, 3, dtype=dtype)).grads()
    assert {name: (g.dtype, g.shape) for name, g in grads.items()} == {
        name: (result, p.shape) for name, p in weights(model).items()
    }
    exact = Probe(network(), weights(network()), loss, batches(7))
    exact.params = weights(exact.model)
    for name, grad in exact.grads().items():
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        assert (grads[name].double() - grad).abs().max() <= tolerance * grad.abs().max()


def test_parameters_that_the_loss_passes_by_get_zeros():
    model = network()
    grads = Probe(model, weights(model), lambda m, b: m[0](b[0]).square().mean(), batches(2)).grads()
    assert grads["2.weight"].tolist() == torch.zeros(3, 5).tolist()
    assert grads["0.weight"].abs().min() > 0


def test_no_gradient_is_left_behind():
    model = network()
    model[0].weight.grad = torch.ones(5, 4, dtype=torch.float64)
    before = fingerprint(model)
    Probe(model, weights(model), loss, batches(2, 1)).grads()
    assert fingerprint(model) == before


def test_results_are_fresh():
    model = network()
    probe = Probe(model, weights(model), loss, batches(2))
    first = probe.grads()
    kept = first["0.weight"].clone()
    first["0.weight"].zero_()
    assert torch.equal(probe.grads()["0.weight"], kept)


def test_weights_times_gradients_agree_over_the_layers_of_a_homogeneous_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 3, bias=False),
    ).double()
    x, y = torch.randn(5, 1, 5, 5, dtype=torch.float64), torch.arange(5) % 3
    grads = Probe(model, weights(model), loss, [(x, y)]).grads()
    sums = [float((p.detach() * grads[name]).sum()) for name, p in weights(model).items()]
    assert len(sums) == 3
    assert abs(sums[0]) > 1e-3
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-10)


def test_filters_before_a_batch_norm_in_train_mode_are_orthogonal_to_their_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-14), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    x, y = torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.arange(6) % 3
    params = {"0.weight": model[0].weight}
    for train, orthogonal in ((True, True), (False, False)):
        grad = Probe(model.train(train), params, loss, [(x, y)]).grads()["0.weight"]
        products = (model[0].weight.detach() * grad).sum((1, 2, 3)).abs()
        assert grad.abs().amax((1, 2, 3)).min() > 1e-4
        assert (products < 1e-9).all() == orthogonal


def test_progress_is_shown_through_track():
    seen = []

    def track(items, label):
        items = list(items)
        seen.append((label, len(items)))
        return items

    model = network()
    Probe(model, weights(model), loss, batches(2, 2, 1), track).grads()
    assert seen == [("gradients", 3)]


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (lambda m, b: m(b[0]).sum(1), ("scalar tensor, its mean", "shape (2,)", "`.mean()`")),
        (lambda m, b: None, ("scalar tensor", "found None")),
        (lambda m, b: 1.5, ("scalar tensor", "found 1.5")),
        (lambda m, b: {"loss": loss(m, b)}, ("scalar tensor", "found {'loss'")),
        (lambda m, b: b[1].sum(), ("scalar tensor", "torch.int64")),
        (lambda m, b: loss(m, b) * torch.nan, ("finite loss", "found nan", "initial weights")),
        (lambda m, b: loss(m, b) * torch.inf, ("finite loss", "found inf", "initial weights")),
        (lambda m, b: loss(m, b).detach(), ("depends on the prunable parameters", "without a gradient", "`detach`")),
    ],
    ids=["vector", "None", "number", "dict", "integer", "nan", "inf", "detached"],
)
def test_a_loss_that_cannot_be_used(bad, parts):
    model = network()
    with expect_refusal(*parts):
        Probe(model, weights(model), bad, batches(2, 1)).grads()
    with expect_refusal(*parts):
        plp.score(model, plp.SNIP(), batches(2, 1), bad)


def test_a_loss_that_passes_all_prunable_parameters_by():
    model = network()
    with expect_refusal("depends on the prunable parameters"):
        Probe(model, weights(model), lambda m, b: m[0].bias.sum(), batches(2)).grads()


@pytest.mark.parametrize(
    ("loss_fn", "given", "missing"),
    [(None, [1], "no a loss function"), (loss, [], "no batches")],
    ids=["loss", "batches"],
)
def test_missing_data(loss_fn, given, missing):
    model = network()
    with expect_refusal("batches and a loss function", "Pass both"):
        Probe(model, weights(model), loss_fn, given and batches(2)).grads()


def test_an_error_of_the_loss_comes_through_unchanged():
    def broken(model, batch):
        raise KeyError("mine")

    model = network()
    with pytest.raises(KeyError, match="mine"):
        Probe(model, weights(model), broken, batches(2)).grads()


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        (torch.zeros(3), torch.zeros(5)),
        {"id": "text", "x": torch.zeros(3, 1), "y": torch.zeros(4)},
        [torch.tensor(7), [torch.zeros(3)]],
    ],
    ids=["tensor", "tuple", "dict", "nested"],
)
def test_batch_size_is_the_first_dimension_of_the_first_tensor_that_has_one(batch):
    assert batch_size(batch) == 3


@pytest.mark.parametrize("batch", [None, (), "text", [torch.tensor(1.0)]])
def test_a_batch_without_samples_to_count(batch):
    with expect_refusal("first dimension counts samples", f"found {type(batch).__name__}"):
        batch_size(batch)


def test_an_empty_batch():
    model = network()
    with expect_refusal("at least one sample"):
        Probe(model, weights(model), lambda m, b: m(b[0]).sum(), [data(0)]).grads()
    with_empty = Probe(model, weights(model), lambda m, b: m(b[0]).sum() / max(len(b[0]), 1), [*batches(3), data(0)])
    without = Probe(model, weights(model), lambda m, b: m(b[0]).mean(0).sum(), batches(3))
    for name, grad in with_empty.grads().items():
        torch.testing.assert_close(grad, without.grads()[name])
