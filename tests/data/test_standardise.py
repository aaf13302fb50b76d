from __future__ import annotations

import fake_data
import pytest
import torch
from torch import nn

import pl_prune as plp
from pl_prune.data import CIFAR, MNIST, SVHN

MOMENTS = {
    CIFAR: ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    SVHN: ([0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970]),
    MNIST: ([0.1307], [0.3081]),
}


@pytest.mark.parametrize("kind", MOMENTS, ids=lambda k: k.__name__)
def test_a_normalized_model_does_what_the_data_no_longer_do(kind, tmp_path, monkeypatch):
    if kind is CIFAR:
        fake_data.cifar(tmp_path / "data", monkeypatch, 10)
    elif kind is SVHN:
        fake_data.svhn(tmp_path / "data", monkeypatch)
    else:
        fake_data.mnist(tmp_path / "data")
    batches = []
    for standardise in (True, False):
        data = kind(str(tmp_path / "data"), workers=0, standardise=standardise)
        data.setup("fit")
        batches.append(next(iter(data.scoring_dataloader()))[0])
        augmented = data.train_set[0][0]
    assert augmented.min() >= 0
    assert augmented.max() <= 1
    standardised, raw = batches
    assert raw.min() >= 0
    assert raw.max() <= 1
    torch.testing.assert_close(plp.NormalizedModel(nn.Identity(), *MOMENTS[kind])(raw), standardised)
