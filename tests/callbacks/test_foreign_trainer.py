"""Both Lightnings in one project: callbacks of the one under the Trainer of the other."""

from __future__ import annotations

import sys

import pytest
import torch
from fake_module import tiny_loader
from lightning.pytorch import Callback
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.__main__ import main

other = pytest.importorskip("pytorch_lightning")
CALLBACKS = [cls for name in plp.__all__ if isinstance(cls := getattr(plp, name), type) and issubclass(cls, Callback)]


class Foreign(other.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_every_callback_is_found():
    assert len(CALLBACKS) > 10
    assert {plp.PruneAtInit, plp.SparsityReport, plp.RunRecord} < set(CALLBACKS)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_callback_under_the_other_trainer_is_refused(kind, tmp_path):
    callback = kind(target_group_sparsity=0.5) if kind is plp.HESSO else kind()
    quiet = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = other.Trainer(callbacks=[callback], accelerator="cpu", default_root_dir=tmp_path, **quiet)
    with expect_refusal("that of pytorch_lightning", "import lightning.pytorch as pl"):
        trainer.fit(Foreign(), tiny_loader())


@pytest.mark.parametrize("key", ["model", "model.class_path"])
def test_a_module_of_the_other_is_refused_on_the_command_line(key, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    with pytest.raises(SystemExit, match="2"):
        main(["fit", f"--{key}={__name__}.Foreign"])
    assert f"found '{__name__}.Foreign', of pytorch_lightning" in capfd.readouterr().err
