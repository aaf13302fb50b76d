"""Run by `test_scores_ddp.py` in one process or two: learn scores with the same global batches, and save what came of it."""

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

CALLBACKS = {
    "HYDRA": lambda: [plp.ScoreLearning(0.7)],
    "S2AP": lambda: [plp.S2AP(0.7, gamma=0.1, warmup_epochs=0)],
    "reuse": lambda: [plp.S2AP(0.7, plp.HARP(), gamma=0.1, warmup_epochs=0, perturbation="reuse")],
    "channels": lambda: [plp.S2AP(0.5, gamma=0.1, warmup_epochs=0, channels=plp.Channels(shrink_at_end=False))],
    "AWP": lambda: [plp.PruneAtInit(plp.Magnitude(), 0.7), plp.AWP(0.1)],
}


class Plain(TinyModule):
    """Without what sees how a batch is shared out: dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1], self.net[7] = nn.Identity(), nn.Identity()
        self.double()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0].double()), batch[1])


def train(folder: str, size: int, name: str):
    seed_everything(1, verbose=False)
    module, callbacks = Plain(), CALLBACKS[name]()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto", callbacks=callbacks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=f"{folder}/{name}{size}",
        precision="64-true",
    )  # fmt: skip
    sampler = DistributedSampler(tiny_data(64), size, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer.fit(module, DataLoader(tiny_data(64), 16 // size, sampler=sampler))
    return module, callbacks[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, size = sys.argv[1], int(sys.argv[2])
    found = {}
    for name in CALLBACKS:
        module, pruner = train(folder, size, name)
        found[name] = {"masks": pruner.masks.state_dict(), "weights": module.state_dict()}
    torch.save(found, f"{folder}/rank{rank_and_size()[0]}.pt")
