"""Measured latency: who is timed, and that nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from fingerprint import fingerprint
from torch import nn

from pl_prune import MaskSet
from pl_prune.report import latency
from pl_prune.report.latency import measure_latency


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    masks = MaskSet({"0.weight": torch.rand(8, 6) > 0.5, "3.weight": torch.zeros(2, 8).bool()})
    masks.apply_(dict(model.named_parameters()))
    return model, masks


def test_dense_and_masked_are_timed_in_turn_and_the_network_stays(network, monkeypatch):
    model, masks = network
    seen = []
    now = 0

    def run():
        nonlocal now
        seen.append(all(bool((p != 0).all()) for n, p in model.named_parameters() if n in masks))
        now += 5 if seen[-1] else 2
        assert not model.training
        assert not torch.is_grad_enabled()
        model(torch.ones(4, 6))

    monkeypatch.setattr(latency, "perf_counter", lambda: now)
    before = fingerprint(model)
    found = measure_latency(model, masks, run, 4, repeats=6)
    assert fingerprint(model) == before
    assert seen.count(True) == seen.count(False) == 9
    assert seen[:4] in ([False, True, True, False], [True, False, False, True])
    assert found.dense == (5, 5, 5)
    assert found.masked == (2, 2, 2)
    assert (found.batch, found.repeats, found.threads) == (4, 6, torch.get_num_threads())
    assert found.device.startswith("cpu (")


def test_medians_and_quartiles():
    assert latency._quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


def test_an_exception_leaves_the_network(network):
    model, masks = network
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="mat1"):
        measure_latency(model, masks, lambda: model(torch.ones(4, 5)), 4)
    assert fingerprint(model) == before
