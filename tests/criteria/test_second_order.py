"""Curvature criteria against dense float64 Hessians and loops over samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from refusal import expect_refusal
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

import pl_prune as plp
from pl_prune.core.allocate import Global
from pl_prune.core.iterate import iterate
from pl_prune.core.probe import Probe

N, CLASSES = 6, 3


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        activation(),
        nn.Conv2d(2, 2, 3, stride=2, groups=2),
        activation(),
        nn.Flatten(),
        nn.Linear(2 * 2 * 2, CLASSES),
    ).double()
    model[1].running_mean.uniform_(-0.2, 0.2)
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def data(*cuts: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 1, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.arange(N) % CLASSES
    edges = [0, *cuts, N]
    return [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def score(model, criterion, *cuts, loss=cross_entropy):
    return flat(plp.score(model, criterion, data(*cuts), loss, plp.Select(output_layer=True)))


def flat(scores) -> Tensor:
    return torch.cat([s.reshape(-1) for s in scores.values()])


def weights(model) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.ndim > 1}


def unflat(model, vector):
    out, at = {}, 0
    for name, w in weights(model).items():
        out[name] = vector[at : at + w.numel()].view_as(w)
        at += w.numel()
    return out


def loss_of(model, temperature=1.0, batch=None):
    x, y = batch or data()[0]
    return lambda v: nn.functional.cross_entropy(functional_call(model, unflat(model, v), (x,)) / temperature, y)


def dense(model, temperature=1.0):
    """Weights, gradient and Hessian of the mean loss over all prunable weights."""
    w = flat(weights(model))
    f = loss_of(model, temperature)
    return w, torch.func.grad(f)(w), hessian(f)(w)


def per_sample_grads(model):
    w = flat(weights(model))
    x, y = data()[0]
    return torch.stack([torch.func.grad(loss_of(model, 1.0, (x[i : i + 1], y[i : i + 1])))(w) for i in range(N)])


def gauss_newton(model, temperature=1.0):
    w = flat(weights(model))
    x, _ = data()[0]
    f = lambda v: functional_call(model, unflat(model, v), (x,)) / temperature  # noqa: E731
    jacobian, p = torch.func.jacrev(f)(w), f(w).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nci,ncd,ndi->i", jacobian, middle, jacobian) / N


def test_fisher_is_the_mean_of_squared_per_sample_gradients_at_any_cut():
    model = network()
    grads = per_sample_grads(model)
    w, fisher = flat(weights(model)), grads.square().mean(0)
    for cuts in [(), (1,), (2, 5), (1, 2, 3, 4, 5)]:
        torch.testing.assert_close(score(model, plp.FisherDiagonal(), *cuts), fisher)
    torch.testing.assert_close(score(model, plp.FisherPruning(), 4), w**2 * fisher / 2)
    g = grads.mean(0)
    torch.testing.assert_close(score(model, plp.FisherTaylor(), 4), (w * g + w**2 * fisher / 2).abs())
    removal = score(model, plp.FisherTaylor(taylor_sign="removal"), 4)
    torch.testing.assert_close(removal, (-w * g + w**2 * fisher / 2).abs())


class Odd(nn.Module):
    """What the fast path must recognise: a sequence, a layer used twice, a transposed convolution, an in-place activation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1, dilation=1)
        self.back = nn.ConvTranspose1d(4, 3, 3, stride=2)
        self.twice = nn.Linear(11, 11)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        x = nn.functional.relu_(self.conv(x.flatten(2)[..., :5]))
        x = self.twice(torch.relu(self.twice(self.back(x))))
        return self.head(x.mean(-1))


class Functional(Odd):
    """Its weight is used outside its layer, which hooks cannot see."""

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x.flatten(1)[:, :3], self.head.weight)


@pytest.mark.parametrize("kind", [Odd, Functional])
def test_fisher_of_unusual_layers(kind):
    torch.manual_seed(0)
    model = kind().double().eval()
    expected = per_sample_grads(model).square().mean(0)
    torch.testing.assert_close(score(model, plp.FisherDiagonal(), 4), expected)


class ByName(nn.Sequential):
    """Calls a layer by the name of its argument."""

    def forward(self, x):
        return self[1](input=self[0](x)).tanh() if len(self) == 2 else super().forward(x)


def with_teacher(model, batch):
    with torch.no_grad():
        target = model(batch[0]).softmax(1)
    return nn.functional.cross_entropy(model(batch[0]), target)


@pytest.mark.parametrize("kind", ["by name", "output size", "teacher"])
def test_fisher_of_layers_called_in_unusual_ways(kind):
    torch.manual_seed(0)
    loss = with_teacher if kind == "teacher" else cross_entropy
    if kind == "output size":
        model = Upsampling().double()
    else:
        model = (ByName(nn.Flatten(), nn.Linear(25, CLASSES)) if kind == "by name" else network()).double()
    x, y = data()[0]
    grads = []
    for i in range(N):
        value = loss(model, (x[i : i + 1], y[i : i + 1]))
        grads.append(flat(dict(enumerate(torch.autograd.grad(value, [p for p in model.parameters() if p.ndim > 1])))))
    torch.testing.assert_close(score(model, plp.FisherDiagonal(), 4, loss=loss), torch.stack(grads).square().mean(0))


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(1, 2, 3, stride=2), nn.Linear(2 * 12 * 12, CLASSES)

    def forward(self, x):
        return self.head(self.up(x, output_size=(12, 12)).tanh().flatten(1))


def test_fisher_of_attention():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            tokens = x.flatten(1)[:, :24].view(-1, 6, 4)
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    model = Attention().double().eval()
    torch.testing.assert_close(score(model, plp.FisherDiagonal(), 4), per_sample_grads(model).square().mean(0))


def test_the_literal_fisher_with_one_batch_ranks_as_the_gradient_and_snip():
    model = network()
    grad, snip = score(model, plp.GradNorm()), score(model, plp.SNIP())
    torch.testing.assert_close(score(model, plp.FisherDiagonal(per_sample=False)), grad**2)
    torch.testing.assert_close(score(model, plp.FisherPruning(per_sample=False)), snip**2 / 2)
    x, y = data()[0]
    w = flat(weights(model))
    batches = [torch.func.grad(loss_of(model, 1.0, (x[a:b], y[a:b])))(w) for a, b in [(0, 4), (4, 6)]]
    expected = torch.stack(batches).square().mean(0)
    torch.testing.assert_close(score(model, plp.FisherDiagonal(per_sample=False), 4), expected)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_all_basis_signs_give_the_exact_diagonal(temperature, monkeypatch):
    """Over a Hadamard basis of sign vectors the mean of z * (H z) is the diagonal exactly."""
    model = network(nn.Tanh)
    w, g, h = dense(model, temperature)
    size = 64
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    assert len(w) <= size

    class Basis:
        def __init__(self, probe, count, seed):
            self.count = count

        def vectors(self, current):
            for k in range(self.count):
                current[:] = unflat(model, hadamard[k, : len(w)]).values()
                yield current

    monkeypatch.setattr("pl_prune.criteria.hutchinson._Signs", Basis)
    for cuts in [(), (1, 4)]:
        for per in ("round", "sample") if cuts else ("round",):
            settings = {"probes": size, "temperature": temperature, "probe_per": per}
            torch.testing.assert_close(score(model, plp.HutchinsonDiagonal(**settings), *cuts), h.diagonal())
    settings["probe_per"] = "round"
    torch.testing.assert_close(score(model, plp.HutchinsonPruning(**settings)), w**2 * h.diagonal() / 2)
    torch.testing.assert_close(score(model, plp.HutchinsonTaylor(**settings)), (w * g + w**2 * h.diagonal() / 2).abs())


def test_hutchinson_is_unbiased_with_the_variance_of_rademacher_probes():
    model = network(nn.Tanh)
    _, _, h = dense(model)
    count = 1000
    settings = {"temperature": 1.0, "probes": count}
    mean = score(model, plp.HutchinsonDiagonal(**settings))
    variance = (h**2).sum(1) - h.diagonal() ** 2
    z = (mean - h.diagonal()) / (variance / count).sqrt().clamp(min=1e-12)
    assert z.abs().max() < 4.5
    assert 0.7 < z.square().mean() < 1.4


@pytest.mark.parametrize(
    "criterion", [plp.HutchinsonDiagonal(probes=3), plp.HutchinsonDiagonal(probes=3, probe_per="sample")]
)
def test_the_cut_of_the_data_does_not_change_the_probes(criterion):
    model = network(nn.Tanh)
    torch.testing.assert_close(score(model, criterion, 1, 4), score(model, criterion))


def test_signs_are_balanced_and_independent_between_probes():
    from pl_prune.criteria.hutchinson import _Signs

    model = nn.Linear(100, 100)
    signs = _Signs(Probe(model, {"weight": model.weight}), 10, 0)
    z = torch.stack([v[0].flatten() for v in signs.vectors([])])
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    correlation = z @ z.T / z.shape[1] - torch.eye(10)
    assert correlation.abs().max() < 0.05
    assert z.mean(1).abs().max() < 0.05


def test_gauss_newton_exact_is_the_diagonal_of_the_hessian_of_a_relu_network_alone():
    relu, tanh = network(), network(nn.Tanh)
    exact = plp.GaussNewtonDiagonal("exact")
    torch.testing.assert_close(score(relu, exact, 4), dense(relu)[2].diagonal(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(score(tanh, exact, 4), gauss_newton(tanh))
    assert not torch.allclose(gauss_newton(tanh), dense(tanh)[2].diagonal(), rtol=1e-2)
    warm = plp.GaussNewtonDiagonal("exact", temperature=5.0)
    torch.testing.assert_close(score(tanh, warm), gauss_newton(tanh, 5.0))
    w, g, h = dense(relu)
    torch.testing.assert_close(score(relu, plp.GaussNewtonPruning("exact")), w**2 * h.diagonal() / 2)
    torch.testing.assert_close(score(relu, plp.GaussNewtonTaylor("exact")), (-w * g + w**2 * h.diagonal() / 2).abs())


@pytest.mark.parametrize("estimator", ["gnb", "sketch"])
def test_gauss_newton_probes_are_unbiased_and_as_accurate_as_said(estimator):
    model = network(nn.Tanh)
    exact = gauss_newton(model)
    live = exact > exact.max() * 1e-6
    errors = []
    for probes in (1, 3, N):
        draws = [score(model, plp.GaussNewtonDiagonal(estimator, probes, seed=seed), 4)[live] for seed in range(300)]
        draws = torch.stack(draws) / exact[live]
        z = (draws.mean(0) - 1) / (draws.std(0) / 300**0.5)
        assert z.abs().max() < 5
        assert z.square().mean() < 2
        errors.append(draws.sub(1).square().mean().sqrt())
        assert errors[-1] < 1.5 * (2 / probes) ** 0.5
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("probes", [1, 4, N, 100])
@pytest.mark.parametrize("estimator", ["gnb", "sketch"])
def test_gauss_newton_probes_do_not_depend_on_the_cut_of_the_data(estimator, probes):
    model = network(nn.Tanh)
    found = score(model, plp.GaussNewtonDiagonal(estimator, probes), 2, 3)
    torch.testing.assert_close(found, score(model, plp.GaussNewtonDiagonal(estimator, probes)))
    assert not torch.equal(found, score(model, plp.GaussNewtonDiagonal(estimator, probes, seed=1)))


def test_the_removal_sign_predicts_the_loss_of_removal():
    model = network()
    w, g, h = dense(model)
    f = loss_of(model)
    base = f(w)
    part = 0.2  # of the way, where the expansion holds closely
    change = vmap(lambda e: f(w * (1 - part * e)))(torch.eye(len(w), dtype=w.dtype)) - base
    second = (part * w) ** 2 * h.diagonal() / 2
    removal, paper = -part * w * g + second, part * w * g + second
    assert torch.corrcoef(torch.stack([change, removal]))[0, 1] > 0.95
    assert torch.corrcoef(torch.stack([change, paper]))[0, 1] < -0.5


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_theta_hg_at_any_cut_and_inverts_on_request(temperature):
    model = network(nn.Tanh)
    w, g, h = dense(model, temperature)
    for cuts in [(), (1, 4)]:
        torch.testing.assert_close(score(model, plp.GraSP(temperature), *cuts), w * (h @ g))
    torch.testing.assert_close(score(model, plp.GraSP(temperature, inverted=True)), -w * (h @ g))


def test_removing_what_grasp_scores_lowest_raises_the_gradient_norm():
    model = network(nn.Tanh)
    w = flat(weights(model))
    scores = score(model, plp.GraSP(1.0))
    step = torch.zeros_like(w)
    lowest = scores.argsort()[:3]
    step[lowest] = -1e-4 * w[lowest]
    norm = lambda v: torch.func.grad(loss_of(model))(v).square().sum()  # noqa: E731
    torch.testing.assert_close(norm(w + step) - norm(w), -2e-4 * scores[lowest].sum(), rtol=1e-2, atol=0)
    assert norm(w + step) > norm(w)


def test_grasp_with_batch_statistics_differentiates_through_them_and_leaves_them():
    model = network(nn.Tanh)
    before = {n: b.clone() for n, b in model.named_buffers()}
    batch_statistics = network(nn.Tanh)
    batch_statistics[1] = nn.BatchNorm2d(2, track_running_stats=False).double()
    w, g, h = dense(batch_statistics, 200.0)
    torch.testing.assert_close(score(model, plp.GraSP(bn_mode="train")), w * (h @ g))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def flow_network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    for _ in range(4):
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-5, 5)
            module.weight.data.uniform_(-2, 2)
    return model


def test_synflow_is_conserved_over_layers_in_float64():
    model = flow_network()
    scores = plp.score(model, plp.SynFlow(), data(), select=plp.Select(output_layer=True))
    absolute = {
        n: p.abs().double() if p.ndim > 1 else torch.zeros_like(p).double() for n, p in model.named_parameters()
    }
    plain = nn.Sequential(*(m for m in model if not isinstance(m, nn.BatchNorm2d)))
    names = [n for n, p in model.named_parameters() if n in scores or n.replace("bias", "weight") in scores]
    renamed = dict(zip([n for n, _ in plain.named_parameters()], [absolute[n] for n in names], strict=True))
    total = functional_call(plain, renamed, (torch.ones(1, 1, 5, 5, dtype=torch.float64),)).sum()
    for layer in scores.values():
        assert layer.min() >= 0
        torch.testing.assert_close(layer.sum(), total, rtol=1e-10, atol=0)


def test_synflow_prunes_by_density_and_empties_no_layer_of_a_chain():
    model = flow_network()
    before = [p.clone() for p in model.parameters()]
    params = plp.Select()(model)
    seen = []

    class Watch(plp.SynFlow):
        def __call__(self, probe):
            seen.append(sum(int((p != 0).sum()) for p in probe.params.values()))
            return super().__call__(probe)

    total = sum(p.numel() for p in params.values())
    masks, _ = iterate(Watch(), Probe(model.eval(), params, None, data()), Global(), 0.97)
    assert [seen[0], *seen[1:]] == [total] + [total - round((1 - 0.03 ** (e / 100)) * total) for e in range(1, 100)]
    kept = {n: k for n, (k, _) in masks.counts().items()}
    assert sum(kept.values()) == total - round(0.97 * total)
    assert min(kept.values()) >= 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "batch", "said"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 1)), (torch.ones(1, 3),), "doubles with its input"),
        (
            nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)),
            (torch.ones(1, 2).long(),),
            "floating-point inputs",
        ),
    ],
    ids=["sigmoid", "integers"],
)
def test_synflow_refuses_what_it_is_not_defined_for(model, batch, said):
    with pytest.raises(plp.PruneError, match=said):
        plp.score(model, plp.SynFlow(), [batch])


def test_batch_coupled_losses_are_refused_by_per_sample_criteria():
    model = network()
    weighted = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], weight=torch.tensor([1.0, 5.0, 9.0]).double())  # noqa: E731
    with pytest.raises(plp.PruneError, match="mean of its samples' losses"):
        score(model, plp.FisherDiagonal(), loss=weighted)
    assert score(model, plp.SNIP(), loss=weighted).isfinite().all()


@pytest.mark.parametrize(
    "criterion", [plp.HutchinsonPruning(), plp.GraSP(), plp.GaussNewtonDiagonal()], ids=lambda c: type(c).__name__
)
def test_a_module_without_logits_is_refused_by_criteria_that_need_them(criterion):
    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x), x

    loss = lambda m, b: nn.functional.cross_entropy(m(b[0])[0], b[1])  # noqa: E731
    with pytest.raises(plp.PruneError, match="logits"):
        score(TwoOutputs(), criterion, loss=loss)


def test_criteria_that_share_a_pass_share_it(monkeypatch):
    calls = []
    original = Probe.mean
    monkeypatch.setattr(Probe, "mean", lambda self, label, *work: calls.append(label) or original(self, label, *work))
    criteria = [
        plp.FisherDiagonal(),
        plp.FisherTaylor(),
        plp.GradNorm(),
        plp.SNIP(),
        plp.HutchinsonDiagonal(),
        plp.HutchinsonTaylor(),
    ]
    model = network()
    together = plp.score(model, criteria, data(), cross_entropy)
    assert sorted(calls) == ["Hutchinson probes", "gradients", "gradients", "squared gradients"]
    for criterion, scores in zip(criteria, together, strict=True):
        torch.testing.assert_close(scores, plp.score(model, criterion, data(), cross_entropy))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class FusedActivation(nn.Module):
    def forward(self, x):
        return Once.apply(x).relu()


@pytest.mark.parametrize("criterion", [plp.GraSP(), plp.HutchinsonPruning()], ids=repr)
def test_an_operation_without_a_second_derivative_is_named(criterion):
    model = network(FusedActivation)
    with expect_refusal("differentiated twice", "SNIP, Fisher, Gauss-Newton"):
        score(model, criterion)
    assert score(model, plp.GaussNewtonPruning(probes=1)).any()


class OnceProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class OnceLinear(nn.Linear):
    def forward(self, x):
        return OnceProduct.apply(x, self.weight)


def test_a_layer_without_a_second_derivative_is_named():
    model = nn.Sequential(nn.Flatten(), OnceLinear(25, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()
    with expect_refusal("differentiated twice", "once_differentiable"):
        score(model, plp.HutchinsonPruning())


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_autocast_inside_the_model_is_kept():
    model = network().float()
    batch = [(data()[0][0].float(), data()[0][1])]
    plain = flat(plp.score(model, plp.HutchinsonPruning(), batch, cross_entropy))
    cast = flat(plp.score(Autocast(*model), plp.HutchinsonPruning(), batch, cross_entropy))
    assert torch.corrcoef(torch.stack([plain, cast]))[0, 1] > 0.99
    assert not torch.equal(plain, cast)


def checkpointed_attention(checkpoint: bool) -> nn.Module:
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(5, 12), nn.Linear(4, CLASSES)

        def attend(self, x):
            q, k, v = self.qkv(x[:, 0]).chunk(3, 2)
            return nn.functional.scaled_dot_product_attention(q, k, v).mean(1)

        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.attend, x, use_reentrant=False) if checkpoint else self.attend(x)
            return self.head(y)

    torch.manual_seed(0)
    return Attends().double()


def test_checkpointed_attention_is_differentiated_twice():
    expected = score(checkpointed_attention(False), plp.HutchinsonDiagonal())
    torch.testing.assert_close(score(checkpointed_attention(True), plp.HutchinsonDiagonal()), expected)


def test_synflow_refuses_a_flow_that_shrinks_with_a_weight():
    class Saturated(nn.Module):
        """Doubles with its input, and yet is no flow."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(2 * self.a(x) - self.b(x))

    batch = (torch.ones(2, 3), torch.arange(2))
    with expect_refusal("grows with every weight", "b.weight"):
        plp.score(Saturated(), plp.SynFlow(), [batch], None)
