"""Masked equals shrunk, over small networks with one difficulty each."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import EXACT, VIOLATIONS, Wired, conv, head, residual
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core.group_rounds import without
from pl_prune.structure.probe import randomised

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def remove_some(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups:
        keep[group.root] = torch.ones(group.size, dtype=torch.bool)
        gone = torch.randperm(group.size, generator=generator)[: max(1, group.size // 3)]
        keep[group.root][gone] = False
    return keep


def masked(model, masks):
    zeroed = copy.deepcopy(model)
    for name, parameter in zeroed.named_parameters():
        if name in masks:
            parameter.data = torch.where(masks[name], parameter.data, 0.0)
    return zeroed.eval()


def assert_told(model):
    """Modules say of themselves what their weights are."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)) and module.weight is not None:
            assert module.weight.shape == (module.num_features,)


@pytest.mark.parametrize("name", EXACT)
def test_masked_equals_shrunk(name):
    torch.manual_seed(0)
    build, sizes = EXACT[name]
    model = randomised(build()).eval()
    groups = plp.trace_groups(model, X)
    assert groups.sizes == sizes
    keep = remove_some(groups)
    masks = groups.expand(keep)
    small = plp.shrink(model, masks, X, groups)
    with torch.no_grad():
        dense, expected, found = model(X), masked(model, masks)(X), small(X)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (dense - expected).abs().max() > 1e-3 * expected.abs().max()
    assert sum(p.numel() for p in small.parameters()) == groups.cost(keep)[0] < groups.cost({})[0]
    assert_told(small)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "grouped"])  # of one channel in a group, it is depthwise
def test_the_groups_of_what_is_left_are_those_that_tracing_it_finds(name):
    torch.manual_seed(0)
    model = randomised(EXACT[name][0]()).eval()
    groups = plp.trace_groups(model, X)
    keep = remove_some(groups)
    small = plp.shrink(model, groups.expand(keep), X, groups)
    mapped = without(groups, keep)
    assert mapped.cost({}) == groups.cost(keep)
    whole = [root for root, size in mapped.sizes.items() if size > 1]  # a single unit cannot leave
    found = plp.trace_groups(small, X)
    assert found.sizes == mapped.subset(whole).sizes
    for root in whole:
        expected = {(m.name, m.dim, m.kind): m.index.tolist() for m in found[root].members}
        assert {(m.name, m.dim, m.kind): m.index.tolist() for m in mapped[root].members} == expected
    assert {n: mapped.shapes[n] for n in found.shapes} == found.shapes
    assert mapped.macs == found.macs


@pytest.mark.parametrize("name", VIOLATIONS)
def test_what_would_change_outputs_is_rejected_with_a_reason(name):
    torch.manual_seed(0)
    build, reason = VIOLATIONS[name]
    groups = plp.trace_groups(build().double(), X)
    assert groups.sizes == {"second": 6}
    assert reason in groups.rejected["first"], groups.rejected
    assert "head.2" in groups.rejected


def test_of_a_sliced_activation_the_part_that_no_one_reads_can_leave():
    def wire(m, x):
        return m.head(m.second(m.first(x)[:, :4]))

    model = Wired(wire, first=conv(3, 8), second=conv(4, 6), head=head(6)).double()
    groups = plp.trace_groups(model, X)
    assert set(groups.sizes.values()) == {4, 6}
    unread = next(g for g in groups if g.size == 4)
    assert unread.members[0].index.flatten().tolist() == [4, 5, 6, 7]


def test_a_shrunk_network_trains_with_its_auxiliary_head():
    build, _ = EXACT["auxiliary head"]
    model = build().double()
    groups = plp.trace_groups(model, X[:1])
    assert "extra.2.weight" in {member.name for member in groups["first"].members}
    small = plp.shrink(model, groups.expand(remove_some(groups)), X[:1]).train()
    main, extra = small(X)
    (main.sum() + extra.sum()).backward()
    assert small.extra[2].weight.shape == (5, 6)
    assert all(p.grad is not None for p in small.parameters())


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 9)
            self.out = nn.Linear(9, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x))

    model, tokens = Tied().double(), torch.arange(7)[None]
    groups = plp.trace_groups(model, tokens)
    assert groups.sizes == {"embed": 9}
    small = plp.shrink(model, groups.expand({"embed": torch.arange(9) < 5}), tokens, groups)
    assert small.out.weight is small.embed.weight
    assert small.embed.weight.shape == (7, 5)
    assert (small.embed.embedding_dim, small.out.in_features) == (5, 5)


def test_the_model_is_left_as_it_was():
    model = residual().train()
    model.c1.weight.requires_grad_(False)
    before = {n: (id(t), t.clone(), t.requires_grad) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    state = torch.get_rng_state()
    groups = plp.trace_groups(model, X.float())
    plp.shrink(model, groups.expand(remove_some(groups)), X.float())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    after = {n: (id(t), t, t.requires_grad) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert before.keys() == after.keys()
    for name, (place, value, grad) in before.items():
        assert (after[name][0], after[name][2]) == (place, grad)
        assert torch.equal(after[name][1], value)
    assert "frozen" in groups.rejected["c1"]


def test_patterns_choose_layers():
    assert plp.trace_groups(residual(), X.float(), include=["c1"]).sizes == {"c1": 8}
    groups = plp.trace_groups(residual(), X.float(), exclude=["n1"])
    assert groups.sizes == {"c0": 8}
    assert "n1 is excluded" in groups.rejected["c1"]


def test_bad_input_is_refused():
    model = residual().float()
    x = X.float()
    with expect_refusal("include", "'c9'"):
        plp.trace_groups(model, x, include=["c9"])
    with expect_refusal("output layer", "'head.2'"):
        plp.trace_groups(model, x, include=["head.2"])
    with expect_refusal("an output layer and no other for 'head.*'"):
        plp.trace_groups(model, x, include=["c1", "head.*"])
    assert plp.trace_groups(model, x, include=["*"]).sizes == {"c0": 8, "c1": 8}
    with expect_refusal("at least one layer", "frozen"):
        plp.trace_groups(residual().requires_grad_(False), x)
    with expect_refusal("to run on the example inputs", "RuntimeError"):
        plp.trace_groups(model, torch.randn(1, 4, 8, 8))
    with expect_refusal("max_seconds", "convolution"):
        plp.trace_groups(model, x, max_seconds=0.0)
    with expect_refusal("example_inputs"):
        plp.trace_groups(model, "x")
    with expect_refusal("model", "None"):
        plp.trace_groups(None, x)


def test_torch_pruning_finds_the_same_channels_in_a_residual_network():
    """An independent tracer, where it works: the same units, coupled in the same way."""
    import torch_pruning as tp

    models = pytest.importorskip("torchvision.models")
    model, x = models.resnet18(weights=None, num_classes=10).eval(), torch.randn(1, 3, 32, 32)
    groups = plp.trace_groups(model, x)
    assert sum(groups.sizes.values()) == 2880
    names = {m: n for n, m in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=(x,))
    theirs = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d]):
        layers = {
            names[dep.target.module]
            for dep, _ in group
            if dep.target.module in names and "out_channels" in dep.handler.__name__
        }
        theirs.add(frozenset(layers))
    ours = {frozenset(m.name.rpartition(".")[0] for m in g.members if m.kind == "out") for g in groups}
    assert ours == theirs


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch has no such operator yet")
def test_experts_in_one_operator_are_refused_with_what_helps():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 16)
            self.experts = nn.Parameter(torch.randn(2, 16, 16))
            self.out = nn.Linear(16, 4)

        def forward(self, x):
            split = torch.tensor([2, 4], dtype=torch.int32)
            return self.out(nn.functional.grouped_mm(self.up(x), self.experts, offs=split))

    with expect_refusal("operator _grouped_mm", "set_experts_implementation('eager')"):
        plp.trace_groups(Experts(), torch.randn(4, 8))


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_those_of_the_cost_report(batch):
    from pl_prune.report.cost import layer_macs

    model, x = residual().double(), torch.randn(batch, 3, 8, 8).double()
    expected = layer_macs(model, lambda: model(x))
    found = plp.trace_groups(model, x).macs
    assert {name: batch * macs for name, macs in found.items()} == expected


@pytest.mark.parametrize("outputs", [1, 2])
def test_layers_of_a_single_output_are_followed(outputs):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, outputs))
    x = torch.randn(4, 2)
    groups = plp.trace_groups(model, x)
    assert groups.sizes == {"0": 3}
    masks = groups.expand({"0": torch.tensor([True, False, True])})
    small = plp.shrink(model, masks, x)
    masks.apply_(dict(model.named_parameters()))
    assert small[2].weight.shape == (outputs, 2)
    torch.testing.assert_close(small(x), model(x))
