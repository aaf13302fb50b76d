"""What shrink keeps, folds, verifies and refuses; heads, streams, files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from networks import around, conv, encoder, head, residual
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.structure.attention import SlicedAttention

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cut(model, x=X, share=0.4, **options):
    groups = plp.trace_groups(model, x, **options)
    units = groups.reduce({n: p.detach().abs() for n, p in model.named_parameters()})
    return groups, groups.expand(plp.Layerwise(min_per_layer=1)(units, share))


def test_flags_layouts_hooks_and_modes_are_kept():
    model = residual().to(memory_format=torch.channels_last).train()
    model.n1.eval()
    model.head[2].weight.requires_grad_(False)
    calls = []
    model.c1.register_forward_hook(lambda *_: calls.append(1))
    groups, masks = cut(model)
    small = plp.shrink(model, masks, X, groups)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    for layer in (small.c1, small.c2):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()
    calls.clear()
    small(X)
    assert calls == [1]
    small(X).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert small.c1.weight.grad.shape == small.c1.weight.shape


def test_weights_that_no_mask_removes_whole_are_zeros_in_the_copy():
    model = residual()
    groups, masks = cut(model)
    scattered = dict(masks)
    generator = torch.Generator().manual_seed(1)
    scattered["head.2.weight"] = torch.rand(model.head[2].weight.shape, generator=generator) > 0.5
    small = plp.shrink(model, plp.MaskSet(scattered), X, groups)
    kept = groups.positions(groups.collapse(masks))["head.2.weight"][1]
    assert torch.equal(small.head[2].weight == 0, ~scattered["head.2.weight"][:, kept])


def test_half_precision_is_verified_in_single():
    model = residual().bfloat16()
    groups = plp.trace_groups(model.float(), X)
    model = model.bfloat16()
    units = {g.root: torch.arange(g.size) < g.size - 1 for g in groups}
    small = plp.shrink(model, groups.expand(units), X, groups)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("padding", [0, 1])
def test_a_constant_that_masked_weights_leave_goes_into_the_next_bias_unless_padding_shows_it(padding):
    torch.manual_seed(0)
    model = (
        nn
        .Sequential(
            conv(3, 8), nn.BatchNorm2d(8), nn.Sigmoid(), conv(8, 6, padding=padding, bias=False), nn.ReLU(), head(6)
        )
        .double()
        .eval()
    )
    nn.init.normal_(model[1].bias)
    x = X.double()
    groups = plp.trace_groups(nn.Sequential(*model[:2], nn.ReLU(), *model[3:]), x)
    masks = {"0.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)}
    masks["0.weight"][[1, 4]] = False
    if padding:
        with expect_refusal("whole units"):
            plp.shrink(model, masks, x, groups)
        return
    small = plp.shrink(model, masks, x, groups)
    assert small[0].out_channels == 6
    assert model[3].bias is None
    assert small[3].bias.shape == (6,)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        expected = model(x)
        assert (small(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True, "add_zero_attn": True}]
)
def test_plain_attention_equals_torchs(batch_first, options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options).double().eval()
    plain = SlicedAttention.of(attention)
    assert dict(plain.named_parameters()).keys() == dict(attention.named_parameters()).keys()
    sizes = (12, options.get("kdim", 12), options.get("vdim", 12))
    q, k, v = (
        torch.randn(*((2, t, s) if batch_first else (t, 2, s))).double() for t, s in zip((4, 6, 6), sizes, strict=True)
    )
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    mask = torch.rand(4, 6) > 0.7
    mask[:, 0] = False
    for settings in (
        {},
        {"need_weights": False},
        {"key_padding_mask": padding, "attn_mask": mask},
        {"attn_mask": torch.randn(6, 4, 6).double(), "average_attn_weights": False},
    ):
        expected, found = attention(q, k, v, **settings), plain(q, k, v, **settings)
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if expected[1] is not None:
            torch.testing.assert_close(found[1], expected[1])


def test_heads_that_do_not_divide_the_width_and_their_file(tmp_path):
    torch.manual_seed(0)
    model = encoder().double()
    x = X.double()
    groups = plp.trace_groups(model, x)
    keep = {g.root: torch.arange(g.size) != 1 for g in groups}
    small = plp.shrink(model, groups.expand(keep), x, groups)
    assert small.stack.layers[0].self_attn.num_heads == 3
    assert small.stack.layers[0].self_attn.in_proj_weight.shape == (54, 24)
    path = plp.save_shrunk(small, tmp_path / "small")
    again = plp.load_shrunk(encoder().double(), path)
    assert torch.equal(again.eval()(x), small.eval()(x))


def test_residual_stream_of_a_transformer_with_exact_false():
    model = encoder()
    with expect_refusal("none that is zero"):
        plp.shrink(model, plp.trace_groups(model, X).expand({}), X)
    groups = plp.trace_groups(model, X, exact=False)
    stream = groups["embed"]
    assert (stream.size, stream.exact) == (24, False)
    assert "embed" in plp.trace_groups(model, X).rejected
    small = plp.shrink(model, groups.expand({"embed": torch.arange(24) < 20}), X, groups)
    assert small.stack.layers[1].norm1.normalized_shape == (20,)
    assert small.embed.weight.shape == (20, 3)
    assert small(X).shape == (2, 5)
    assert sum(p.numel() for p in small.parameters()) == groups.cost({"embed": torch.arange(24) < 20})[0]


def test_a_file_is_read_in_another_process_without_pickle(tmp_path):
    model = residual().eval()
    groups, masks = cut(model)
    small = plp.shrink(model, masks, X, groups)
    smaller = plp.shrink(small, cut(small, share=0.3)[1], X)  # cuts of cuts
    path = plp.save_shrunk(smaller, tmp_path / "small.bin")
    assert path.name == "small.safetensors"
    assert json.loads(path.with_suffix(".json").read_text())["dense"]["c1.weight"] == [8, 8, 3, 3]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    torch.save({"x": X, "y": smaller(X)}, tmp_path / "io.pt")
    code = (
        "import sys, torch, pl_prune as plp; from networks import residual; io = torch.load(sys.argv[2]);"
        "m = plp.load_shrunk(residual().eval(), sys.argv[1]); print(torch.equal(m(io['x']), io['y']), m.c1.out_channels)"
    )
    run = [sys.executable, "-c", code, str(path), str(tmp_path / "io.pt")]
    done = subprocess.run(run, cwd="tests/structure", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(smaller.c1.out_channels)]


def test_files_of_other_networks_and_damaged_ones_are_refused(tmp_path):
    model = residual()
    groups, masks = cut(model)
    path = plp.save_shrunk(plp.shrink(model, masks, X, groups), tmp_path / "small")
    with expect_refusal("Wired", "differences", "is missing here"):
        plp.load_shrunk(around(nn.BatchNorm2d(8)), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fresh = residual()
    with expect_refusal("save_shrunk"):
        plp.load_shrunk(fresh, path)
    assert fresh.c1.out_channels == 8
    with expect_refusal("found none at"):
        plp.load_shrunk(fresh, tmp_path / "other")
    with expect_refusal("without its cuts"):
        plp.save_shrunk(fresh, path)
    small = plp.shrink(model, masks, X, groups)
    small.c1 = conv(1, 1)
    with expect_refusal("'c1.weight' of shape", "changed the network since"):
        plp.save_shrunk(small, tmp_path / "changed")
    assert not (tmp_path / "changed.safetensors").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model = residual()
    groups, masks = cut(model)
    small = plp.shrink(model, masks, X, groups)
    path = plp.save_shrunk(small, tmp_path / "small")
    content = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with torch.no_grad():
        small.c1.weight.zero_()
    with pytest.raises(OSError, match="disk full"):
        plp.save_shrunk(small, path)
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_input_is_refused():
    model = residual()
    groups, masks = cut(model)
    with expect_refusal("unstructured mask"):
        plp.shrink(model, {"c1.weight": torch.rand(8, 8, 3, 3) > 0.5}, X, groups)
    with expect_refusal("c9.weight"):
        plp.shrink(model, {"c9.weight": torch.ones(2, dtype=torch.bool)}, X, groups)
    with expect_refusal("at least one unit left", "c1"):
        plp.shrink(model, groups.expand({"c1": torch.zeros(8, dtype=torch.bool)}), X, groups)
    with expect_refusal("groups of this Wired", "c1.weight"):
        plp.shrink(around(nn.ReLU()), {}, X, groups)
    with expect_refusal("agree with the masked one"):
        wrong = groups.state_dict()
        bad = next(g for g in wrong["groups"] if g["root"] == "c1")
        bad["members"] = [{**m, "index": m["index"].flip(0)} if m["kind"] == "in" else m for m in bad["members"]]
        plp.shrink(model, masks, X, plp.ParameterGroups.from_state_dict(wrong))


def test_a_shrunk_transformer_shrinks_again(tmp_path):
    torch.manual_seed(0)
    model = encoder().double()
    x = X.double()
    small = model
    for share in (0.3, 0.5):
        small = plp.shrink(small, cut(small, x, share)[1], x)
    assert small.stack.layers[0].self_attn.num_heads == 2
    path = plp.save_shrunk(small, tmp_path / "small")
    assert torch.equal(plp.load_shrunk(encoder().double(), path).eval()(x), small.eval()(x))
