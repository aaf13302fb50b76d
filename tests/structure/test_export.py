"""Files that run elsewhere and compute the same."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import encoder, head, residual
from refusal import expect_refusal
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import pl_prune as plp
from pl_prune.structure import export as room
from pl_prune.structure import formats

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FORMATS = ["torch", "torch.export", "onnx"]


def has_onnx() -> bool:
    return torch.__version__ >= "2.7" and all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


def halved(model: nn.Module) -> nn.Module:
    groups = plp.trace_groups(model, X)
    return plp.shrink(model, groups.expand({g.root: torch.arange(g.size) % 2 == 0 for g in groups}), X, groups)


@pytest.fixture(scope="module")
def shrunk():
    torch.manual_seed(0)
    dense = Both(residual(), encoder()).eval()
    nn.init.normal_(dense.net.n1.bias)
    small = halved(dense)
    with torch.no_grad():
        return dense, small, small(X)


class Both(nn.Module):
    """Convolutions with norms and residuals, and attention whose heads do not divide its width."""

    def __init__(self, net: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.net, self.attention = net, attention

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.attention(x)


class Named(nn.Module):
    """Keywords in, a dict out, a tied weight, a tensor that is no batch, and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: Tensor, shift: Tensor, mask: Tensor | None = None) -> dict[str, object]:
        hidden = self.embed(ids) * self.scale + shift
        return {"logits": self.out(hidden * mask[..., None]), "hidden": hidden, "steps": 3}


NAMED = {"ids": torch.arange(18).view(3, 6) % 10, "shift": torch.randn(4), "mask": torch.ones(3, 6)}


def elsewhere(code: str, *argv: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_program_of_a_shrunk_network_runs_in_a_process_that_knows_torch_alone(shrunk, tmp_path):
    _, small, expected = shrunk
    done = plp.export(small, tmp_path / "small", X)
    assert done.path == tmp_path / "small.pt2"
    assert (done.format, done.bytes) == ("torch.export", done.path.stat().st_size)
    assert done.max_rel <= done.max_abs / float(expected.abs().max()) + 1e-12 <= 1e-6
    torch.save({"x": X, "y": expected}, tmp_path / "io.pt")
    code = (
        "import sys, torch; run = torch.export.load(sys.argv[1]).module(); io = torch.load(sys.argv[2]); x, y = io['x'], io['y'];"
        "print(max(float((run(x[:n]) - y[:n]).abs().max()) for n in (1, 2, 5)), 'pl_prune' in sys.modules)"
    )
    error, ours = elsewhere(code, str(done.path), str(tmp_path / "io.pt"))
    assert float(error) <= 1e-6
    assert ours == "False"


@pytest.mark.skipif(not has_onnx(), reason="the extra export is not installed, or torch is older than 2.7")
def test_a_graph_of_a_shrunk_network_runs_in_onnxruntime_alone(shrunk, tmp_path):
    import numpy as np

    _, small, expected = shrunk
    done = plp.export(small, tmp_path / "small", X, "onnx")
    np.savez(tmp_path / "io.npz", x=X.numpy(), y=expected.numpy())
    code = (
        "import sys, numpy, onnxruntime; run = onnxruntime.InferenceSession(sys.argv[1]); io = numpy.load(sys.argv[2]);"
        "outs = {n: run.run(None, {'x': io['x'][:n]})[0] for n in (1, 2, 5)};"
        "print(max(abs(outs[n] - io['y'][:n]).max() for n in outs), 'torch' in sys.modules)"
    )
    error, torch_there = elsewhere(code, str(done.path), str(tmp_path / "io.npz"))
    assert float(error) <= 1e-5 * float(expected.abs().max())
    assert torch_there == "False"


def test_weights_of_a_shrunk_network_are_read_back_by_load_shrunk(shrunk, tmp_path):
    dense, small, expected = shrunk
    done = plp.export(small, tmp_path / "small", X, "torch", dense=dense)
    assert (done.max_abs, done.max_rel) == (0, 0)
    assert done.bytes == done.path.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.json", "small.safetensors"]
    again = plp.load_shrunk(dense, done.path).eval()
    assert torch.equal(again(X), expected)
    assert torch.equal(done.run(X)[0], expected)


@pytest.mark.parametrize("format", FORMATS)
def test_keywords_and_outputs_of_all_kinds(format, tmp_path):
    if format == "onnx" and not has_onnx():
        pytest.skip("the extra export is not installed")
    torch.manual_seed(0)
    model = Named().train()
    done = plp.export(model, tmp_path / "named", NAMED, format)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    two = {"ids": NAMED["ids"][:2], "shift": NAMED["shift"], "mask": NAMED["mask"][:2]}
    found, expected = done.run(two), model(**two)
    assert len(found) == 2
    torch.testing.assert_close(found[0], expected["logits"])
    torch.testing.assert_close(found[1], expected["hidden"])
    if format == "torch":
        assert set(load_file(done.path)) == {"embed.weight", "out.weight", "scale"}
        Named().load_state_dict(load_file(done.path))


def test_samples_of_the_data_are_not_in_the_file(tmp_path):
    done = plp.export(head(3), tmp_path / "head", X)
    (args, _) = torch.export.load(done.path).example_inputs
    assert [leaf.untyped_storage().nbytes() for leaf in args] == [4]
    assert not args[0].any()


def test_one_number_of_samples_where_the_network_takes_no_other(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(5, -1).cumsum(0)

    with expect_refusal("Fixed", "dynamic_batch=False"):
        plp.export(Fixed(), tmp_path / "fixed", X)
    assert not list(tmp_path.iterdir())
    done = plp.export(Fixed(), tmp_path / "fixed", X, dynamic_batch=False)
    assert torch.equal(done.run(X)[0], X.view(5, -1).cumsum(0))


def test_outputs_that_differ_leave_the_old_file_alone(tmp_path, monkeypatch):
    class Unsteady(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(())

    for format in FORMATS[:2]:
        file = tmp_path / ("unsteady" + room.SUFFIXES[format])
        file.write_bytes(b"old")
        count = iter(range(100))
        monkeypatch.setattr(room, "outputs", lambda m, a, k, count=count: [a[0] + next(count)])
        with expect_refusal("agree with the network to 1e-04", "No file was left", "random in evaluation mode"):
            plp.export(Unsteady(), tmp_path / "unsteady", X, format)
        assert file.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch):
    real = formats.import_module

    def missing(name: str):
        if name == package:
            raise ImportError(name)
        return real(name) if has_onnx() else None

    monkeypatch.setattr(formats, "import_module", missing)
    with expect_refusal(f"Expected {package},", "pip install 'pl_prune[export]'"):
        plp.export(head(3), tmp_path / "head", X, "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not has_onnx(), reason="the extra export is not installed, or torch is older than 2.7")
def test_a_torch_that_cannot_write_onnx_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cpu"))
    with expect_refusal("torch 2.7 or newer", "found 2.6.0+cpu", "torch.export"):
        plp.export(head(3), tmp_path / "head", X, "onnx")
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused(tmp_path):
    class Value(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with expect_refusal("format", "'tensorrt'"):
        plp.export(head(3), tmp_path / "a", X, "tensorrt")
    with expect_refusal("a tensor of samples"):
        plp.export(head(3), tmp_path / "a", {"x": 3})
    with expect_refusal("Value to be exported", "format='torch'"):
        plp.export(Value(), tmp_path / "a", X)
    assert not list(Path(tmp_path).iterdir())
