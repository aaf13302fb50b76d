"""Group criteria against formulas in float64, PROscore against scales that are really put in."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from refusal import expect_refusal
from torch import nn

import pl_prune as plp


class Net(nn.Module):
    """Residual sums, a shared and an in-place ReLU, functions, GELU and a bias, as somebody might write them.

    With `scales`, D * x - D' * x is really added behind each named layer, and gradients of D can be asked of autograd.
    """

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.c1, self.n1 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.c2, self.n2 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 7, 3)
        self.hidden, self.head = nn.Linear(7, 8), nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace)
        self.inplace = inplace
        self.scales: dict[str, torch.Tensor] = {}
        for norm in (self.n0, self.n1, self.n2):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)
        nn.init.uniform_(self.n1.bias, -1.0, 0.0)

    def act(self, name, x, sigma):
        if name not in self.scales:
            return sigma(x)
        d = self.scales[name]
        shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
        extra = d.view(shape) * x - d.detach().view(shape) * x
        return extra + sigma(x.clone())

    def forward(self, x):
        x = self.act("n0", self.n0(self.stem(x)), self.relu)
        out = self.act("n1", self.n1(self.c1(x)), self.relu)
        out = self.act("n2", self.n2(self.c2(out)), lambda t: t)
        if self.inplace:
            out += x
            torch.relu_(out)
        else:
            out = F.relu(out + x)
        out = self.act("plain", self.plain(out), lambda t: F.relu(t, inplace=self.inplace))
        out = self.act("hidden", self.hidden(out.mean((2, 3))), F.gelu)
        return self.head(out)


def problem(inplace=True, dtype=torch.float64):
    torch.manual_seed(0)
    model = Net(inplace).to(dtype).eval()
    x = torch.randn(7, 2, 6, 6, dtype=dtype)
    y = torch.arange(7) % 3
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    return model, plp.trace_groups(model, x[:2]), batches, (x, y)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_the_groups_of_the_network_are_those_that_the_oracles_assume():
    _, groups, _, _ = problem()
    assert groups.sizes == {"stem": 6, "c1": 5, "plain": 7, "hidden": 8}


def injected(model, whole, lam, normalize):
    """Tangents by layer, with D and D' in the network."""
    filters = {n: [m.weight, m.bias] for n, m in model.named_children() if isinstance(m, nn.BatchNorm2d)}
    filters |= {"plain": [model.plain.weight], "hidden": [model.hidden.weight]}
    flat = {
        n: torch.cat([p.detach().flatten(1) if p.ndim > 1 else p.detach()[:, None] for p in ps], 1)
        for n, ps in filters.items()
    }
    model.scales = {n: f.norm(dim=1).requires_grad_() for n, f in flat.items()}
    value = loss(model, whole)
    plain, model.scales, scales = loss_without(model, whole), {}, model.scales
    assert torch.allclose(value, plain)
    out = {}
    for n, params in filters.items():
        *grads, gd = torch.autograd.grad(value, [*params, scales[n]], retain_graph=True)
        g = torch.cat([t.flatten(1) if t.ndim > 1 else t[:, None] for t in grads], 1)
        f, d = flat[n], scales[n].detach()
        for i in range(len(d)):
            if normalize:
                top = (f[i] / d[i] - lam * d[i] * g[i]).norm()
                low = abs(1 - lam * gd[i])
            else:
                top, low = (f[i] - lam * g[i]).norm(), abs(d[i] - lam * gd[i])
            out.setdefault(n, []).append(top / low)
    return {n: torch.stack(v) for n, v in out.items()}


def loss_without(model, batch):
    scales, model.scales = model.scales, {}
    value = loss(model, batch)
    model.scales = scales
    return value


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lam", [1e-3, 1.0])
def test_proscore_is_that_of_scales_that_are_really_there(inplace, normalize, lam):
    model, groups, batches, whole = problem(inplace)
    expected = injected(model, whole, lam, normalize)
    found = plp.score_groups(model, plp.PROscore(lam=lam, normalize=normalize), groups, batches, loss)
    torch.testing.assert_close(found["c1"], expected["n1"])
    torch.testing.assert_close(found["plain"], expected["plain"])
    torch.testing.assert_close(found["hidden"], expected["hidden"])
    torch.testing.assert_close(found["stem"], (expected["n0"] + expected["n2"]) / 2)
    largest = plp.score_groups(model, plp.PROscore(lam=lam, normalize=normalize, across="max"), groups, batches, loss)
    torch.testing.assert_close(largest["stem"], torch.maximum(expected["n0"], expected["n2"]))


def test_scores_that_float32_cannot_tell_apart_keep_their_order():
    model, groups, batches, _ = problem()
    orders = []
    for dtype in (torch.float32, torch.float64):
        data = [(x.to(dtype), y) for x, y in batches]
        found = plp.score_groups(model.to(dtype), plp.PROscore(1e-9), groups, data, loss)
        assert {root: len(scores.unique()) for root, scores in found.items()} == groups.sizes
        orders.append({root: scores.argsort().tolist() for root, scores in found.items()})
    assert orders[0] == orders[1]


def test_the_normalised_score_does_not_change_when_a_filter_is_scaled_and_the_next_layer_scaled_back():
    model, groups, batches, _ = problem()
    before = {n: plp.score_groups(model, plp.PROscore(0.1, n), groups, batches, loss)["plain"] for n in (True, False)}
    with torch.no_grad():  # a positive scale passes the ReLU
        model.plain.weight[2] *= 5
        model.plain.bias[2] *= 5
        model.hidden.weight[:, 2] /= 5
    after = {n: plp.score_groups(model, plp.PROscore(0.1, n), groups, batches, loss)["plain"] for n in (True, False)}
    torch.testing.assert_close(after[True], before[True])
    assert not torch.allclose(after[False], before[False])


def test_filters_are_rows_of_weights_if_asked_for_and_dead_ones_score_nothing():
    model, groups, batches, whole = problem()
    with torch.no_grad():
        model.c1.weight[3] = 0
    (grad,) = torch.autograd.grad(loss(model, whole), model.c1.weight)
    f, g = model.c1.weight.detach().flatten(1), grad.flatten(1)
    norm = f.norm(dim=1)
    # batch norm, no activation, follows the row itself: dL/dD = <F, dL/dF>
    expected = (f - 0.1 * g).norm(dim=1) / (norm - 0.1 * (f * g).sum(1)).abs()
    expected[3] = 0
    found = plp.score_groups(model, plp.PROscore(0.1, target="weight"), groups, batches, loss)["c1"]
    torch.testing.assert_close(found, expected)


def test_the_scale_stands_behind_a_layer_that_computes_its_weight():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            self.out = self._conv_forward(x, w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1), self.bias)
            return self.out

    model, groups, batches, whole = problem()
    weight = model.c1.weight
    model.c1 = Standardised(6, 5, 3, padding=1, bias=False).double()
    model.c1.weight = weight
    value = loss(model, whole)
    out = model.c1.out
    grad, behind = torch.autograd.grad(value, [weight, out])
    f, g = weight.detach().flatten(1), grad.flatten(1)
    offset = (out * behind).sum((0, 2, 3)).detach()  # <F, dL/dF> is zero here
    assert offset.abs().max() > 1e3 * (f * g).sum(1).abs().max()
    expected = (f - 100.0 * g).norm(dim=1) / (f.norm(dim=1) - 100.0 * offset).abs()
    found = plp.score_groups(model, plp.PROscore(100.0, target="weight"), groups, batches, loss)["c1"]
    torch.testing.assert_close(found, expected)


def test_a_layer_used_twice_adds_up_and_projections_without_a_module_are_linear():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Linear(4, 6)
            self.dec = nn.Linear(6, 3)
            self.d = None

        def forward(self, x):
            total = 0
            for part in (x, 2 * x - 1):
                pre = self.enc(part)
                total = total + F.relu(pre) + (0 if self.d is None else self.d * pre - self.d.detach() * pre)
            return self.dec(total)

    torch.manual_seed(1)
    model = Twice().double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    groups = plp.trace_groups(model, x)
    found = plp.score_groups(model, plp.PROscore(0.5), groups, [(x, y)], loss)["enc"]
    f = model.enc.weight.detach()
    model.d = f.norm(dim=1).requires_grad_()
    g, gd = torch.autograd.grad(loss(model, (x, y)), [model.enc.weight, model.d])
    torch.testing.assert_close(found, (f - 0.5 * g).norm(dim=1) / (f.norm(dim=1) - 0.5 * gd).abs())


def test_heads_of_attention_are_scored_by_their_rows():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True).double()
    nn.init.uniform_(model.self_attn.in_proj_bias)
    net = nn.Sequential(model, nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(5, 3, 8, dtype=torch.float64), torch.arange(5) % 3
    groups = plp.trace_groups(net, x)
    root = next(r for r in groups.sizes if "attn" in r)
    found = plp.score_groups(net, plp.PROscore(0.5), groups, [(x, y)], loss)
    w, b = model.self_attn.in_proj_weight, model.self_attn.in_proj_bias
    net.eval()
    gw, gb = torch.autograd.grad(loss(net, (x, y)), [w, b])
    rows = (w - 0.5 * gw).norm(dim=1) / (w.norm(dim=1) - 0.5 * ((w * gw).sum(1) + b * gb)).abs()
    (member,) = [m for m in groups[root].members if m.kind == "out" and m.name.endswith("in_proj_weight")]
    torch.testing.assert_close(found[root], rows.detach()[member.index].mean(1))


def units(model, groups, root, names):
    """The entries of every unit as vectors, by a loop."""
    tensors = dict(model.named_parameters())
    vectors = []
    for u in range(groups.sizes[root]):
        parts = []
        for name in names:
            (m,) = [m for m in groups[root].members if m.kind == "out" and m.name == name]
            parts += [tensors[name].select(m.dim, int(i)).flatten() for i in m.index[u]]
        vectors.append(torch.cat(parts))
    return torch.stack(vectors)


WEIGHTS = {
    "stem": ["stem.weight", "c2.weight"],
    "c1": ["c1.weight"],
    "plain": ["plain.weight"],
    "hidden": ["hidden.weight"],
}


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "l2"])
def test_by_group_reduces_the_entries_of_a_unit(reduce):
    model, groups, _, _ = problem()
    found = plp.score_groups(model, plp.ByGroup(plp.Magnitude(), reduce), groups)
    by = {
        "sum": lambda v: v.sum(1),
        "mean": lambda v: v.mean(1),
        "max": lambda v: v.amax(1),
        "l2": lambda v: v.norm(dim=1),
    }
    for root, names in WEIGHTS.items():
        torch.testing.assert_close(found[root], by[reduce](units(model, groups, root, names).detach().abs()))


@pytest.mark.parametrize("members", ["weights", "all"])
def test_taylor_sums_before_or_after_the_absolute_value(members):
    model, groups, batches, whole = problem()
    grads = dict(
        zip(
            [n for n, _ in model.named_parameters()],
            torch.autograd.grad(loss(model, whole), list(model.parameters())),
            strict=True,
        )
    )

    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = {n: (p * grads[n]).detach() for n, p in model.named_parameters()}

        def named_parameters(self):
            return self.tensors.items()

    names = (
        WEIGHTS
        if members == "weights"
        else {
            **WEIGHTS,
            "c1": ["c1.weight", "n1.weight", "n1.bias"],
            "stem": ["stem.weight", "n0.weight", "n0.bias", "c2.weight", "n2.weight", "n2.bias"],
            "plain": ["plain.weight", "plain.bias"],
        }
    )
    names = {r: n for r, n in names.items() if r != "hidden"}
    first = plp.score_groups(model, plp.Taylor(members=members), groups, batches, loss)
    second = plp.score_groups(model, plp.Taylor("abs_then_sum", members), groups, batches, loss)
    for root, some in names.items():
        changes = units(Products(), groups, root, some)
        torch.testing.assert_close(first[root], changes.sum(1).abs())
        torch.testing.assert_close(second[root], changes.abs().sum(1))


def test_geometric_median_sums_distances():
    model, groups, _, _ = problem()
    found = plp.score_groups(model, plp.GeometricMedian(), groups)
    for root, names in WEIGHTS.items():
        v = units(model, groups, root, names).detach()
        expected = torch.stack([sum((v[i] - v[j]).norm() for j in range(len(v))) for i in range(len(v))])
        torch.testing.assert_close(found[root], expected)


LIFTED = [
    plp.Magnitude(), plp.Random(), plp.SNIP(), plp.GradNorm(), plp.GraSP(), plp.FisherDiagonal(), plp.FisherPruning(), plp.FisherTaylor(),
    plp.HutchinsonDiagonal(), plp.HutchinsonPruning(), plp.HutchinsonTaylor(), plp.GaussNewtonDiagonal(),
    plp.GaussNewtonPruning(), plp.GaussNewtonTaylor(), plp.YOPO(),
]  # fmt: skip
CRITERIA = [plp.PROscore(), plp.Taylor(), plp.GeometricMedian(), *map(plp.ByGroup, LIFTED)]


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_every_criterion_scores_every_unit_and_leaves_no_trace(criterion):
    model, groups, batches, _ = problem(dtype=torch.float32)
    model.train()
    model.c1.weight.requires_grad_(False)
    before, state = fingerprint(model), torch.get_rng_state()
    first = plp.score_groups(model, criterion, groups, batches, loss)
    again = plp.score_groups(model, pickle.loads(pickle.dumps(criterion)), groups, batches, loss)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert {r: tuple(s.shape) for r, s in first.items()} == {r: (n,) for r, n in groups.sizes.items()}
    assert all(torch.equal(first[r], again[r]) for r in first)
    assert not any(s.requires_grad for s in first.values())
    assert dataclasses.is_dataclass(criterion)
    if isinstance(criterion, plp.ByGroup):  # reduced by the same criterion on the same parameters
        select = plp.Select(exclude=["head"], frozen=True)
        whole = plp.score(model, criterion.criterion, batches, loss, select)
        torch.testing.assert_close(groups.reduce(whole), first)


def test_no_hook_is_left_when_a_loss_fails():
    model, groups, batches, _ = problem()
    calls = []

    def failing(model, batch):
        calls.append(loss(model, batch))
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        plp.score_groups(model, plp.PROscore(), groups, batches, failing)
    assert len(calls) == 1
    assert not any(m._forward_hooks for m in model.modules())


def test_bad_input_is_refused():
    model, groups, batches, _ = problem()
    with expect_refusal("ByGroup"):
        plp.score_groups(model, plp.SNIP(), groups, batches, loss)
    with expect_refusal("batches"):
        plp.score_groups(model, plp.Taylor(), groups)
    with expect_refusal("rounds"):
        plp.ByGroup(plp.SynFlow())
    with expect_refusal("lam"):
        plp.PROscore(lam=0.0)
    with expect_refusal("order"):
        plp.Taylor("squared")
    other = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with expect_refusal("Trace"):
        plp.score_groups(other, plp.ByGroup(), groups)
    with expect_refusal("Trace"):
        plp.score_groups(other, plp.ByGroup(), groups)
