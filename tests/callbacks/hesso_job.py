"""Run by `test_hesso_callback.py` in one process or two: train under HESSO with the same global batches, and save what came of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_module import TinyModule, tiny_data
from torch.utils.data import DataLoader, DistributedSampler

import pl_prune as plp
from pl_prune.core.sync import rank_and_size

PRUNERS = {
    "hesso": lambda: plp.HESSO(0.5, unit="steps", start=2, duration=6, periods=3),
    "cric": lambda: plp.HESSO(0.5, unit="steps", start=2, duration=4, cric=plp.CRIC(3, max_cycles=2)),
}


class Plain(TinyModule):
    """Without what sees how a batch is shared out: dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1], self.net[7] = nn.Identity(), nn.Identity()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def train(folder: str, size: int, name: str):
    seed_everything(1, verbose=False)
    module, pruner = Plain(), PRUNERS[name]()
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto", callbacks=[pruner], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=f"{folder}/{name}{size}",
    )  # fmt: skip
    data = tiny_data(64)
    sampler = DistributedSampler(data, size, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer.fit(module, DataLoader(data, 16 // size, sampler=sampler))
    return module, pruner


if __name__ == "__main__":
    folder, size = sys.argv[1], int(sys.argv[2])
    found = {}
    for name in PRUNERS:
        module, pruner = train(folder, size, name)
        found[name] = {"masks": pruner.masks.state_dict(), "weights": module.state_dict()}
    torch.save(found, f"{folder}/rank{rank_and_size()[0]}.pt")
