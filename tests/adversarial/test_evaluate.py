from __future__ import annotations

import json
import random
import sys
import types
from math import comb, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from fingerprint import fingerprint
from linear_model import Linear, images, network
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.adversarial import chunk as chunk_room
from pl_prune.adversarial.statistics import mcnemar, wilson


def batch(n=12, classes=5):
    x, y = images(n, classes, torch.float32)
    return x * 0.8 + 0.1, y


def labelled(model, n=40, classes=5, wrong=3):
    """Images with the labels that a model gives them, but for the first few."""
    x, _ = batch(n, classes)
    y = model(x).argmax(1).detach()
    y[:wrong] = (y[:wrong] + 1) % classes
    return x, y


@pytest.fixture
def short(monkeypatch):
    """Attacks of few steps: Square alone would take minutes."""
    import pyautoattack

    class Short(pyautoattack.AutoAttack):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 5
            self.square.n_queries = 20

    monkeypatch.setattr("pyautoattack.AutoAttack", Short)
    return Short


def test_a_linear_model_is_as_robust_as_the_closed_form_says():
    model = Linear()
    x, y = labelled(model)
    previous, found = 1.0, set()
    for eps in (4 / 255, 8 / 255, 16 / 255):
        result = plp.robust_accuracy(model, x, y, eps=eps)
        stands = model.stands(x, y, eps)
        assert list(result.flags) == stands.tolist()
        assert result.robust == int(stands.sum()) / 40
        assert result.clean == 37 / 40
        assert list(result.after) == ["apgd-ce", "apgd-t"]
        assert result.robust < previous
        previous = result.robust
        found.add(result.robust)
    assert len(found - {0.0, 37 / 40}) >= 2


def test_without_a_radius_it_is_clean_accuracy():
    model = Linear()
    x, y = labelled(model)
    result = plp.robust_accuracy(model, x, y, eps=0)
    assert result.clean == result.robust == 37 / 40
    assert result.after == {}


@pytest.mark.parametrize("preset", ["pgd", "fast"])
def test_a_constant_model_cannot_be_attacked(preset):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    nn.init.zeros_(model[1].weight)
    x, y = batch()
    result = plp.robust_accuracy(model, x, y, preset=preset)
    assert result.flags == result.correct
    assert 0 < result.clean < 1


def test_it_is_what_autoattack_says(short, monkeypatch):
    model = network(12).float().eval()
    x, y = labelled(model, 30, 12)
    theirs = short(model, eps=0.02, norm="Linf", seed=0)
    _, labels = theirs.run_standard_evaluation(x, y, batch_size=30)
    ours = plp.robust_accuracy(model, x, y, eps=0.02, preset="standard", chunk_size=30)
    assert list(ours.flags) == (labels == y).tolist()
    assert list(ours.after) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert 0 < ours.robust < ours.clean
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=Theirs, __name__="autoattack"))
    other = plp.robust_accuracy(model, x, y, eps=0.02, preset="standard", chunk_size=30)
    assert other.survived == ours.survived
    assert other.settings["attack"] == "autoattack"
    monkeypatch.setitem(sys.modules, "autoattack", None)
    with expect_refusal("pyautoattack", "pl_prune[robust]"):
        plp.robust_accuracy(model, x, y)
    assert plp.robust_accuracy(model, x, y, preset="pgd").total == 30


class Theirs:
    """The authors' own interface, which prints unless it is told not to."""

    def __new__(cls, model, norm="Linf", eps=0.3, seed=None, verbose=True, version="standard", device="cuda"):
        from pyautoattack.autoattack import AutoAttack

        assert not verbose
        made = AutoAttack(model, norm=norm, eps=eps, seed=seed, version=version, device=device)
        made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 5
        made.square.n_queries = 20
        return made


def test_an_interruption_loses_one_chunk(tmp_path, monkeypatch):
    model = network(5).float().eval()
    x, y = labelled(model)
    whole = plp.robust_accuracy(model, x, y, eps=0.02, preset="pgd", chunk_size=10)
    attack = chunk_room.Judge._attack
    attacked = []

    def stopping(self, number, *args):
        attacked.append(number)
        if number == 2 and len(attacked) < 4:
            raise KeyboardInterrupt
        return attack(self, number, *args)

    monkeypatch.setattr(chunk_room.Judge, "_attack", stopping)
    with pytest.raises(KeyboardInterrupt):
        plp.robust_accuracy(model, x, y, eps=0.02, preset="pgd", chunk_size=10, folder=tmp_path)
    assert attacked == [0, 1, 2]
    assert len(list(tmp_path.rglob("chunk_*.json"))) == 2
    again = plp.robust_accuracy(model, x, y, eps=0.02, preset="pgd", chunk_size=10, folder=tmp_path)
    assert attacked == [0, 1, 2, 2, 3]
    assert again == whole
    assert 0 < whole.robust < whole.clean < 1
    assert len(list(tmp_path.rglob("*"))) == 5  # the folder and its files; nothing half-written
    plp.robust_accuracy(model, x, y, eps=0.02, preset="pgd", chunk_size=20, folder=tmp_path)
    assert len(list(tmp_path.rglob("chunk_*.json"))) == 6  # other settings have a folder of their own
    plp.robust_accuracy(model, x[:20], y[:20], eps=0.02, preset="pgd", chunk_size=10, folder=tmp_path)
    assert len(list(tmp_path.rglob("chunk_*.json"))) == 8  # and so has a smaller number of images


def test_chunks_of_other_images_are_refused(tmp_path):
    model = network(5).float().eval()
    x, y = labelled(model, 12)
    plp.robust_accuracy(model, x, y, preset="pgd", folder=tmp_path)
    with expect_refusal("other images", "chunk_00000.json"):
        plp.robust_accuracy(model, x.flip(0), y, preset="pgd", folder=tmp_path)
    file = next(tmp_path.rglob("chunk_*.json"))
    file.write_text("{")
    with expect_refusal("something else", "chunk_00000.json"):
        plp.robust_accuracy(model, x, y, preset="pgd", folder=tmp_path)


class Scaled(nn.Module):
    def __init__(self, net, mean):
        super().__init__()
        self.net, self.mean = net, mean

    def forward(self, x):
        return self.net(x - self.mean)


def test_chunks_of_another_model_with_the_same_weights_are_refused(tmp_path):
    net = network(5).float().eval()
    x, y = labelled(net, 12)
    one = plp.robust_accuracy(Scaled(net, 0.5), x, y, preset="pgd", folder=tmp_path)
    assert plp.robust_accuracy(Scaled(net, 0.5), x, y, preset="pgd", folder=tmp_path) == one
    with expect_refusal("another model with the same weights", "chunk_00000.json"):
        plp.robust_accuracy(Scaled(net, 0.4), x, y, preset="pgd", folder=tmp_path)


@pytest.mark.parametrize("preset", ["pgd", "fast"])
def test_half_precision_images_are_attacked_in_single_precision(preset):
    net = network(5).float().eval()
    x, y = labelled(net)
    x = x.bfloat16()
    half, single = (plp.robust_accuracy(net, pixels, y, eps=0.02, preset=preset) for pixels in (x, x.float()))
    assert half.survived == single.survived
    assert 0 < single.robust < single.clean


def test_it_leaves_no_trace(short):
    model = network(5).float()
    model[0].weight.requires_grad_(False)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    before, given, tracer = fingerprint(model), (x.clone(), y.clone()), sys.gettrace()
    random.seed(3)
    before["random"] = random.getstate()
    with torch.inference_mode():
        inside = plp.robust_accuracy(model, x, y, preset="untargeted", eps=0.001)
    outside = plp.robust_accuracy(model, x, y, preset="untargeted", eps=0.001)
    assert inside == outside
    assert fingerprint(model) == before
    assert sys.gettrace() is tracer
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])


def test_the_seed_decides_and_autocast_does_not():
    model = network(5).float().eval()
    x, y = labelled(model)
    settings = {"eps": 0.02, "preset": "pgd"}
    with torch.autocast("cpu", torch.bfloat16):
        inside = plp.robust_accuracy(model, x, y, **settings)
    torch.manual_seed(9)
    assert plp.robust_accuracy(model, x, y, **settings) == inside
    assert plp.robust_accuracy(model, x, y, seed=1, **settings).settings != inside.settings
    half = plp.robust_accuracy(network(5).double(), x, y, **settings)
    assert half.flags == inside.flags


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    model = Linear(classes)
    x, y = labelled(model, 16, classes)
    for preset in ("fast", "standard"):
        with expect_refusal("at least 4 classes", f"found {classes}", "untargeted"):
            plp.robust_accuracy(model, x, y, preset=preset)
    result = plp.robust_accuracy(model, x, y, preset="pgd", eps=4 / 255)
    assert result.robust >= float(model.stands(x, y, 4 / 255).float().mean())


@pytest.mark.parametrize("classes", [2, 3])
def test_untargeted_attacks_of_few_classes(short, classes):
    model = Linear(classes)
    x, y = labelled(model, 16, classes)
    result = plp.robust_accuracy(model, x, y, preset="untargeted", eps=4 / 255)
    assert list(result.after) == ["apgd-ce", "fab", "square"]
    assert list(result.flags) == model.stands(x, y, 4 / 255).tolist()


def test_l2():
    model = Linear()
    x, y = labelled(model, 20)
    small, large = (plp.robust_accuracy(model, x, y, eps=eps, norm="l2") for eps in (0.05, 0.2))
    assert small.clean > small.robust > large.robust


class Model(nn.Module):
    """Logits, and something done to them."""

    def __init__(self, spoil):
        super().__init__()
        self.net, self.spoil = network(5).float(), spoil

    def forward(self, x):
        return self.spoil(self.net(x))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda z: z + 0.01 * torch.randn_like(z), ("same function each time", "two passes")),
        (lambda z: z - z.mean(0), ("each image on its own", "other images of the batch")),
        (lambda z: z.softmax(1), ("Expected logits", "probabilities")),
        (lambda z: z / 0, ("finite logits",)),
        (lambda z: z[:, :2], ("labels from 0 to 1",)),
        (lambda z: (z, z), ("found tuple",)),
    ],
)
def test_models_that_cannot_be_judged_are_refused(spoil, parts):
    with expect_refusal(*parts):
        plp.robust_accuracy(Model(spoil), *batch())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"eps": 8}, ("eps in (0, 1]",)),
        ({"eps": -1}, ("found -1",)),
        ({"eps": float("inf"), "norm": "l2"}, ("above 0", "found inf")),
        ({"preset": "quick"}, ("preset", "'fast'")),
        ({"norm": "l1"}, ("norm",)),
        ({"chunk_size": 0}, ("chunk_size",)),
        ({"x": batch()[0] * 255}, ("[0, 1]", "NormalizedModel")),
        ({"x": batch()[0].flatten(1)}, ("(N, C, H, W)",)),
        ({"x": batch()[0][:0], "y": batch()[1][:0]}, ("images to attack; found none",)),
        ({"y": batch()[1] + 9}, ("labels from 0 to 4",)),
    ],
)
def test_bad_input_is_refused(change, parts):
    x, y = batch()
    with expect_refusal(*parts):
        plp.robust_accuracy(**{"model": network(5).float(), "x": x, "y": y, **change})


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (3, 10), (50, 100), (10, 10), (4960, 10000)])
def test_wilsons_interval_holds_the_proportions_that_a_score_test_accepts(successes, total):
    low, high = wilson(successes, total)
    for end in (low, high):
        if 0 < end < 1:
            z = abs(successes / total - end) / sqrt(end * (1 - end) / total)
            assert z == pytest.approx(1.959964, rel=1e-5)
    assert 0 <= low <= successes / total <= high <= 1


def test_mcnemar_counts_what_is_as_far_from_even():
    for b in range(6):
        for c in range(6):
            n = b + c
            tail = sum(comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= abs(b - n / 2))
            assert mcnemar(b, c) == pytest.approx(min(1, tail / 2**n))
    assert mcnemar(4000, 5000) < 1e-20


def test_two_models_are_compared_image_by_image():
    first, second = Linear(), network(5).float().eval()
    x, y = labelled(first)
    one, two = (plp.robust_accuracy(m, x, y, preset="pgd", eps=0.01) for m in (first, second))
    paired = one.compare(two)
    assert paired.difference == pytest.approx(one.robust - two.robust)
    assert paired.only_first == sum(a and not b for a, b in zip(one.flags, two.flags, strict=True))
    assert paired.p_value == mcnemar(paired.only_first, paired.only_second) < 0.01
    assert "McNemar" in paired.text()
    assert json.loads(json.dumps(one.to_dict()))["robust"] == one.robust
    with expect_refusal("other images"):
        one.compare(plp.robust_accuracy(second, x.flip(0), y, preset="pgd", eps=0.01))
    with expect_refusal("other settings"):
        one.compare(plp.robust_accuracy(second, x, y, preset="pgd", eps=0.02))


def test_corrupted_images(tmp_path):
    rng = np.random.default_rng(0)
    model = plp.NormalizedModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), [0.5], [0.2])
    labels = np.tile(np.arange(8) % 4, 5)
    np.save(tmp_path / "labels.npy", labels)
    pixels = {name: rng.integers(0, 256, (40, 6, 6, 1), dtype=np.uint8) for name in ("fog", "snow")}
    for name, array in pixels.items():
        np.save(tmp_path / f"{name}.npy", array)
    found = plp.corruption_accuracy(model.train(), tmp_path, corruptions=["fog", "snow"], batch_size=3)
    for name, array in pixels.items():
        x = torch.from_numpy(array[16:24]).permute(0, 3, 1, 2) / 255
        assert found.by_name[name] == float((model(x).argmax(1) == torch.arange(8) % 4).float().mean())
    assert found.mean == sum(found.by_name.values()) / 2
    assert model.training
    assert "mean, severity 3" in found.text()
    assert plp.corruption_accuracy(model, tmp_path, 1, ["fog"], images=5).severity == 1
    with expect_refusal("frost.npy"):
        plp.corruption_accuracy(model, tmp_path, corruptions=["frost"])
    with expect_refusal("severity", "found 6"):
        plp.corruption_accuracy(model, tmp_path, 6)
    np.save(tmp_path / "fog.npy", pixels["fog"].astype(np.float32))
    with expect_refusal("uint8", "float32"):
        plp.corruption_accuracy(model, tmp_path, corruptions=["fog"])
