from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
import torch
from fingerprint import fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import expect_refusal
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pl_prune import MaskSet
from pl_prune.core.neutral import is_norm, neutral_norms
from pl_prune.report.collapse import find_path
from pl_prune.report.cost import Cost, layer_macs, measure_cost
from pl_prune.report.sparsity import LayerSparsity, layer_sparsity
from pl_prune.report.table import PruningReport, columns, compare


def run(model, batch):
    return model(batch)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (4, 3, 2), (3, 2, 2, 2), (2, 2, 1, 2, 2)])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_layer_counts_by_a_loop(shape, density):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    array = keep.numpy()
    cols = 1 if len(shape) > 1 else 0
    (found,) = layer_sparsity(MaskSet({"layer": keep}))
    kernels = None
    if len(shape) > 2:
        kernels = sum(not array[i, j].any() for i in range(shape[0]) for j in range(shape[1])) / (shape[0] * shape[1])
    assert found == LayerSparsity(
        name="layer",
        shape=shape,
        kept=int(array.sum()),
        total=array.size,
        empty_rows=sum(not array[i].any() for i in range(shape[0])),
        empty_cols=sum(not np.take(array, j, axis=cols).any() for j in range(shape[cols])),
        kernel_sparsity=kernels if kernels is None else pytest.approx(kernels),
    )
    assert found.density == array.sum() / array.size
    assert found.collapsed == (not array.any())


def test_layers_come_in_the_order_of_the_masks():
    masks = MaskSet({name: torch.ones(1, 1).bool() for name in "cab"})
    assert [layer.name for layer in layer_sparsity(masks)] == ["c", "a", "b"]


def test_a_bottleneck_lost_80_percent_or_more():
    def layer(kept, total):
        return LayerSparsity("a", (total,), kept, total, 0, 0, None)

    for total in range(1, 2000):
        kept = total // 5
        assert layer(kept, total).bottleneck, total
        assert not layer(kept + 1, total).bottleneck, total
    assert layer(0, 7).bottleneck
    assert layer(0, 7).collapsed
    assert layer(0, 0).density == 1.0


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.tied = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.tied.weight = self.inner.weight
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = self.inner(self.tied(self.inner(x)))
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)), (3, 4)),
    "linear over tokens": (lambda: nn.Linear(4, 5), (3, 7, 4)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, (1, 3), dilation=2)),
        (3, 2, 9, 11),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv1d(8, 8, 1, groups=8).requires_grad_(False))[:1],
        (2, 4, 6, 6),
    ),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (3, 2, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
    "unbatched conv": (lambda: nn.Conv2d(2, 4, 3), (2, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
    "reused": (Reused, (2, 2, 5, 5)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_against_the_flop_counter_of_torch(name):
    make, shape = NETWORKS[name]
    model, x = make(), torch.ones(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    macs = layer_macs(model, lambda: model(x))
    assert set(macs) <= {n for n, _ in model.named_parameters()}
    assert sum(macs.values()) * 2 == counter.get_total_flops()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 3), (5, 4)])
def test_macs_of_attention_projections(batch_first, separate, lengths):
    width, other = 8, 4 if separate else 8
    queries, keys = lengths
    layer = nn.MultiheadAttention(width, 2, kdim=other, vdim=other, batch_first=batch_first)
    q, k = torch.ones(2, queries, width), torch.ones(2, keys, other)
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    expected = {"out_proj.weight": 2 * queries * width * width}
    if separate:
        expected["q_proj_weight"] = 2 * queries * width * width
        expected["k_proj_weight"] = expected["v_proj_weight"] = 2 * keys * width * other
    else:
        expected["in_proj_weight"] = 2 * (queries + 2 * keys) * width * width
    assert layer_macs(layer, lambda: layer(q, k, k)) == expected
    assert layer_macs(layer, lambda: layer(query=q, key=k, value=k)) == expected


def test_macs_of_an_encoder_layer_are_those_of_its_slow_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = layer_macs(layer, lambda: layer(torch.ones(2, 5, 8)))
    assert found == {
        "self_attn.in_proj_weight": 10 * 3 * 64,
        "self_attn.out_proj.weight": 10 * 64,
        "linear1.weight": 10 * 128,
        "linear2.weight": 10 * 128,
    }
    assert torch.backends.mha.get_fastpath_enabled()


def test_cost_counts_the_whole_model_for_one_sample():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))
    keep = torch.zeros(4, 1, 3, 3).bool()
    keep[0] = True
    masks = MaskSet({"0.weight": keep})
    before = fingerprint(model)
    cost = measure_cost(model, masks, lambda: model(torch.ones(5, 1, 5, 5)), 5)
    assert cost == Cost(params=36 + 8 + 108 + 3, params_kept=9 + 8 + 108 + 3, macs=36 * 9 + 108, macs_kept=9 * 9 + 108)
    assert fingerprint(model) == before


def test_counting_leaves_no_trace_after_an_exception():
    model = nn.Sequential(nn.Linear(4, 5), nn.MultiheadAttention(4, 2))
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="mat1"):
        layer_macs(model, lambda: model[0](torch.ones(2, 3)))
    assert fingerprint(model) == before
    assert torch.backends.mha.get_fastpath_enabled()


@st.composite
def wirings(draw):
    widths = draw(st.lists(st.integers(1, 3), min_size=3, max_size=5))
    return [
        torch.tensor(draw(st.lists(st.booleans(), min_size=a * b, max_size=a * b))).view(b, a)
        for a, b in itertools.pairwise(widths)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(wirings(), st.booleans())
def test_path_against_a_walk_through_the_graph(wiring, convolutions):
    layers = []
    for keep in wiring:
        b, a = keep.shape
        layers += [
            nn.Conv2d(a, b, 1) if convolutions else nn.Linear(a, b),
            nn.BatchNorm2d(b) if convolutions else nn.LayerNorm(b),
            nn.ReLU(),
        ]
    model = nn.Sequential(*layers)
    masks = MaskSet({f"{3 * i}.weight": k[..., None, None] if convolutions else k for i, k in enumerate(wiring)})
    alive = set(range(wiring[0].shape[1]))
    for keep in wiring:
        alive = {row for row in range(keep.shape[0]) if any(keep[row, col] for col in alive)}
    x = torch.randn(2, wiring[0].shape[1], *((3, 3) if convolutions else ()))
    assert find_path(model, masks, run, x) is bool(alive)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.inner(x).relu())


def test_path_through_a_shortcut():
    def dead(*names):
        shapes = {"stem.weight": (4, 3), "inner.weight": (4, 4)}
        return MaskSet({name: torch.full(shape, name not in names) for name, shape in shapes.items()})

    model, x = Block(), torch.randn(2, 3)
    assert find_path(model, dead(), run, x) is True
    assert find_path(model, dead("inner.weight"), run, x) is True
    assert find_path(model, dead("stem.weight"), run, x) is False


def test_path_counts_what_is_kept_and_not_what_the_weights_are():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[0].bias.fill_(1)
        model[2].weight.fill_(-1e-30)
    ones = MaskSet.ones_like({"0.weight": model[0].weight})
    assert find_path(model, ones, run, torch.zeros(1, 3)) is True
    assert find_path(model, MaskSet({"0.weight": torch.zeros(3, 3).bool()}), run, torch.zeros(1, 3)) is False


def test_path_of_a_very_deep_net_does_not_underflow():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(60)))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1e-20)
    masks = MaskSet.ones_like({n: p for n, p in model.named_parameters() if p.ndim > 1})
    assert find_path(model, masks, run, torch.ones(1, 2)) is True


def test_path_from_integer_inputs():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    for value in (True, False):
        assert find_path(model, MaskSet({"1.weight": torch.full((4, 4), value)}), run, torch.tensor([[1, 2]])) is value


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

    def forward(self, x):
        q = self.query(x)
        return self.head((q @ q.transpose(1, 2) + self.mask).softmax(-1) @ q)


@pytest.mark.parametrize("value", [True, False])
def test_path_through_causal_attention(value):
    masks = MaskSet({"query.weight": torch.full((4, 4), value)})
    assert find_path(Causal(), masks, run, torch.randn(2, 5, 4)) is value


@pytest.mark.parametrize("value", [True, False])
def test_path_through_an_encoder_layer(value):
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    assert find_path(model, MaskSet({"0.weight": torch.full((8, 4), value)}), run, torch.randn(2, 5, 4)) is value


class Single(nn.Module):
    """Insists on single precision."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x.float())


def test_path_is_unknown_where_the_network_cannot_be_run():
    masks = MaskSet({"layer.weight": torch.ones(2, 3).bool()})
    assert find_path(Single(), masks, run, torch.ones(1, 3)) is None
    assert find_path(nn.Flatten(), MaskSet({}), run, torch.ones(1, 3)) is None


@pytest.mark.parametrize("make", [Block, Single])
def test_looking_for_a_path_leaves_no_trace(make):
    model = nn.ModuleDict({"net": make(), "norm": nn.BatchNorm1d(2)}).train()
    x = torch.randn(4, 3)
    before = fingerprint(model)
    find_path(model, MaskSet({}), lambda m, x: m["norm"](m["net"](x)), x)
    assert fingerprint(model) == before
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        nn.LocalResponseNorm(2),
        nn.InstanceNorm1d(4),
    ],
)
def test_norms_are_the_identity_for_as_long_as_asked(norm):
    model, x = nn.Sequential(norm), torch.randn(3, 4, 4)
    before, trained = fingerprint(model), model.eval()(x)
    with pytest.raises(RuntimeError, match="boom"), neutral_norms(model):  # noqa: PT012
        assert model(x) is x
        raise RuntimeError("boom")
    assert torch.equal(model(x), trained)
    assert fingerprint(model.train()) == before


def test_a_norm_that_somebody_replaced_already_gets_that_back():
    model, x = nn.Sequential(nn.LayerNorm(2)), torch.ones(1, 2)
    model[0].forward = lambda x: x + 1
    with neutral_norms(model):
        with neutral_norms(model):
            assert model(x) is x
        assert model(x) is x
    assert model(x).tolist() == [[2.0, 2.0]]


def test_norms_are_known_by_type_or_name():
    class MyLayerNorm2d(nn.Module):
        pass

    class Normalize(nn.Module):
        pass

    assert is_norm(MyLayerNorm2d())
    assert not is_norm(Normalize())
    assert not is_norm(nn.Linear(1, 1))


def report(**changes):
    keep = {
        "features.0.weight": torch.ones(4, 1, 3, 3).bool(),
        "features.3.weight": torch.zeros(8, 4, 3, 3).bool(),
        "head.weight": (torch.arange(50) < 10).view(5, 10),
    }
    settings_ = {
        "method": "SNIP()",
        "layers": layer_sparsity(MaskSet(keep)),
        "cost": Cost(1000, 622, 54321, 12345),
        "path": False,
        "zeros": 400,
        "metrics": {"val/acc": 0.5},
    }
    return PruningReport(**{**settings_, **changes})


def test_totals_of_a_report():
    found = report()
    assert (found.kept, found.total) == (46, 374)
    assert found.sparsity == pytest.approx(328 / 374)
    assert found.collapsed() == ["features.3.weight"]
    empty = report(layers=[])
    assert (empty.sparsity, empty.collapsed()) == (0.0, [])


def test_a_report_is_plain_data():
    data = json.loads(json.dumps(report().to_dict()))
    assert data["sparsity"] == report().sparsity
    assert data["cost"] == {"params": 1000, "params_kept": 622, "macs": 54321, "macs_kept": 12345}
    assert [layer["density"] for layer in data["layers"]] == [1.0, 0.0, 0.2]
    assert data["layers"][1] == {
        "name": "features.3.weight",
        "shape": [8, 4, 3, 3],
        "kept": 0,
        "total": 288,
        "empty_rows": 8,
        "empty_cols": 4,
        "kernel_sparsity": 1.0,
        "density": 0.0,
        "collapsed": True,
        "bottleneck": True,
    }
    assert (data["method"], data["path"], data["zeros"], data["metrics"]) == ("SNIP()", False, 400, {"val/acc": 0.5})


@pytest.mark.parametrize(
    ("path", "text"), [(True, "yes"), (False, "NO: no input reaches the output"), (None, "unknown")]
)
def test_the_text_of_a_report(path, text):
    lines = report(path=path).text().splitlines()
    assert max(map(len, lines)) <= 120
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["features.0.weight"].split()[1:] == ["4x1x3x3", "36", "/", "36", "100.00%", "0/4", "0/1", "0.0%"]
    assert rows["features.3.weight"].split()[-5:] == ["0.00%", "8/8", "4/4", "100.0%", "COLLAPSED"]
    assert rows["head.weight"].split()[-5:] == ["20.00%", "4/5", "0/10", "-", "bottleneck"]
    summary = {line[:22].strip(): line[22:] for line in lines[lines.index("") + 1 :]}
    assert summary["method"].strip() == "SNIP()"
    assert "46 of 374 kept (sparsity 0.8770); 400 zeros measured" in summary["prunable parameters"]
    assert "622 of 1,000 parameters kept (37.80% pruned)" in summary["whole model"]
    assert "12,345 of 54,321 (22.73%)" in summary["MACs per sample"]
    assert summary["layers"].strip() == "1 collapsed, 1 bottlenecks (at least 80 % gone), of 3"
    assert summary["path input to output"].strip() == text


def test_columns_line_up():
    lines = columns([("name", "n"), ("a", "1,000"), ("longer", "2")]).splitlines()
    assert lines == ["name        n", "-------------", "a       1,000", "longer      2"]


def test_runs_side_by_side(tmp_path):
    for name, metrics in (("dense", {"val/acc": 0.9, "extra": 1.0}), ("snip", {"loss": 2.0, "val/acc": 0.8})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report(metrics=metrics).to_dict()))
    head, rule, dense, snip = compare([tmp_path / "dense", str(tmp_path / "snip")]).splitlines()
    assert re.split(r"  +", head) == ["run", "sparsity", "params kept", "MACs kept", "val/acc"]
    assert set(rule) == {"-"}
    assert dense.split() == [str(tmp_path / "dense"), "0.8770", "622", "12,345", "0.9000"]
    assert snip.split() == [str(tmp_path / "snip"), "0.8770", "622", "12,345", "0.8000"]


def test_a_folder_without_a_report(tmp_path):
    with expect_refusal(str(tmp_path / "report.json"), "found none", "SparsityReport"):
        compare([tmp_path])


class Preprocessed(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(3, 3), activation, nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.activation(self.first((x - 128) / 64)))


@pytest.mark.parametrize(
    ("activation", "kept", "path"),
    [(nn.ReLU(), True, True), (nn.ReLU(), False, False), (nn.Sigmoid(), True, None), (nn.Sigmoid(), False, None)],
    ids=str,
)
def test_path_does_not_trust_preprocessing_or_constants(activation, kept, path):
    masks = MaskSet({"first.weight": torch.full((3, 3), kept)})
    assert find_path(Preprocessed(activation), masks, run, torch.rand(2, 3)) is path
