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
