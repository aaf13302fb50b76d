from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from fingerprint import fingerprint
from torch import nn

from pl_prune.core.sandbox import untouched


def network():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.randn(2, 4)
    model.register_buffer("step", torch.tensor(3))
    return model


def trample(model):
    """Change whatever a training step may change."""
    torch.rand(3), random.random(), np.random.rand(2)
    model.train()
    model.zero_grad()
    model(torch.randn(5, 3)).sum().backward()
    model.step += 1
    model[1].running_mean = torch.ones(4)
    model[0].bias.requires_grad_(True)
    model[3].bias.requires_grad_(False)
    model[3].weight.grad = torch.zeros(2, 4)
    model[0].bias.grad = torch.ones(4)
    model[0].register_forward_hook(lambda *_: None)
    model[1].momentum = 0.5
    model[0].extra = 1
    model.register_buffer("late", torch.ones(1))
    model.add_module("late_layer", nn.Linear(1, 1))
    del model[0].out_features


class StepError(Exception):
    pass


def test_everything_that_a_step_changes_comes_back():
    model = network()
    before = fingerprint(model)
    with untouched(model):
        trample(model)
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_also_after_an_exception():
    model = network()
    before = fingerprint(model)
    with pytest.raises(StepError, match="boom"), untouched(model):  # noqa: PT012
        trample(model)
        raise StepError("boom")
    assert fingerprint(model) == before


def test_gradients_accumulated_in_place_come_back():
    model = network()
    before = fingerprint(model)
    with untouched(model):
        model(torch.randn(5, 3)).sum().backward()
    assert fingerprint(model) == before


@pytest.mark.parametrize("train", [False, True])
def test_the_mode_inside(train):
    model = network()
    with untouched(model, train=train):
        assert {m.training for m in model.modules()} == {train}
    assert [m.training for m in model] == [True, False, True, True]


def test_gradients_flow_whatever_the_surroundings():
    model = network().eval()
    with torch.no_grad(), untouched(model):
        assert model(torch.ones(1, 3)).requires_grad
    with torch.inference_mode():
        with untouched(model):
            assert model(torch.ones(1, 3)).requires_grad
        assert torch.is_inference_mode_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        with untouched(model):
            assert model(torch.ones(1, 3)).dtype == torch.float32
        assert model(torch.ones(1, 3)).dtype == torch.bfloat16


def draws():
    return torch.rand(2).tolist(), random.random(), np.random.rand(2).tolist()


def test_randomness_inside_depends_on_the_seed_alone():
    def inside(seed):
        with untouched(nn.Linear(1, 1), seed=seed):
            return draws()

    first = inside(3)
    draws()
    assert inside(3) == first
    assert inside(4) != first


def test_randomness_outside_goes_on_as_if_nothing_had_been():
    layer = nn.Linear(1, 1)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    undisturbed = [draws(), draws()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    disturbed = [draws()]
    with untouched(layer):
        draws()
    assert [*disturbed, draws()] == undisturbed


def contents():
    return {
        "tensor": torch.arange(3.0),
        "strided": torch.arange(6.0)[::2],
        "expanded": torch.ones(1).expand(3),
        "list": [torch.zeros(2), [1, 2]],
        "tuple": (torch.zeros(2), [torch.ones(1)]),
        "dict": {"a": torch.zeros(1), "b": {"c": [3]}},
        "ordered": OrderedDict(x=1, y=torch.ones(1)),
        "default": defaultdict(list, a=[1]),
        "counter": Counter(a=2, b=1),
        "deque": deque([torch.zeros(1), 2], maxlen=2),
        "set": {1, 2},
        "number": 1.5,
        "text": "x",
        "nothing": None,
    }


CHANGES = {
    "tensor": lambda v: v.add_(1),
    "strided": lambda v: v.zero_(),
    "expanded": lambda v: None,
    "list": lambda v: (v[0].fill_(7), v[1].append(3), v.reverse()),
    "tuple": lambda v: (v[0].fill_(7), v[1].clear()),
    "dict": lambda v: (v["a"].fill_(7), v["b"]["c"].append(4), v.pop("b")),
    "ordered": lambda v: (v.move_to_end("x"), v["y"].zero_()),
    "default": lambda v: (v["a"].append(2), v["new"]),
    "counter": lambda v: v.update("aab"),
    "deque": lambda v: (v[0].fill_(7), v.append(3)),
    "set": lambda v: (v.add(3), v.discard(1)),
    "number": lambda v: None,
    "text": lambda v: None,
    "nothing": lambda v: None,
}


@pytest.mark.parametrize("kind", contents())
def test_what_a_module_holds_comes_back_with_its_contents(kind):
    model = nn.Linear(1, 1)
    model.held = held = contents()[kind]
    with untouched(model):
        CHANGES[kind](held)
        model.held = "replaced"
    assert model.held is held
    assert repr(held) == repr(contents()[kind])


def test_a_buffer_of_every_kind_comes_back():
    model = nn.Linear(1, 1)
    base = torch.arange(4.0)
    model.register_buffer("whole", base)
    model.register_buffer("view", base[1:3])
    model.register_buffer("count", torch.tensor(1), persistent=False)
    model.register_buffer("constant", torch.ones(1).expand(3))
    model.register_buffer("absent", None)
    before = fingerprint(model)
    with untouched(model):
        model.view.zero_()
        model.count += 1
        model.absent = torch.ones(1)
    assert fingerprint(model) == before
    assert model.absent is None
    model.whole.fill_(9)
    assert model.view.tolist() == [9.0, 9.0]


def test_it_nests():
    model = network()
    before = fingerprint(model)
    with untouched(model):
        trample(model)
        middle = fingerprint(model)
        with untouched(model, train=True, seed=1):
            model[1](torch.randn(5, 4))
        assert fingerprint(model) == middle
    assert fingerprint(model) == before
