from __future__ import annotations

import torch
from refusal import expect_refusal
from torch import nn

from pl_prune.core.files import load_weights


class Distilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher, self.student = nn.Linear(3, 2), nn.Linear(3, 2)
        self.other = nn.Linear(4, 2)


def test_weights_that_fit_several_submodules_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(nn.Linear(3, 2).state_dict(), path)
    model = Distilled()
    before = [p.clone() for p in model.parameters()]
    with expect_refusal("teacher, student", "whole module"):
        load_weights(model, path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weights_go_to_the_submodule_of_their_shapes_and_parameters_stay_the_same_objects(tmp_path):
    path = tmp_path / "weights.pt"
    source, model = nn.Linear(4, 2), Distilled()
    torch.save(source.state_dict(), path)
    before = dict(model.named_parameters())
    load_weights(model, path)
    assert torch.equal(model.other.weight, source.weight)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_new_head_keeps_its_own_weights_and_the_rest_is_loaded(tmp_path):
    path = tmp_path / "weights.pt"
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 10))
    torch.save(source.state_dict(), path)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6))
    head = [p.clone() for p in model[1].parameters()]
    with expect_refusal("1.weight is (10, 4), not (6, 4)"):
        load_weights(model, path)
    load_weights(model, path, new_head=True)
    assert torch.equal(model[0].weight, source[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(head, model[1].parameters(), strict=True))


def test_only_one_layer_may_be_new(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 10)).state_dict(), path)
    with expect_refusal("0.weight is (5, 3), not (4, 3)"):
        load_weights(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6)), path, new_head=True)
