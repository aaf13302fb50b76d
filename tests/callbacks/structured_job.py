"""Run by `test_structured_ddp.py` in two processes: cut, train, and save what each rank got."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_module import TinyModule, tiny_loader

import pl_prune as plp
from pl_prune.core.sync import rank_and_size

SAMPLES = plp.Samples(total=23, batch_size=4)  # 12 and 11


class Bound(TinyModule):
    """Ranks start from other weights, under an optimizer that was built on the whole network."""

    def __init__(self) -> None:
        torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
        super().__init__()
        self.net[7] = nn.Identity()
        self.built = [torch.optim.SGD(self.parameters(), lr=0.05)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.built[0]


def cut(folder: str, size: int, epochs: int = 1, ckpt: str | None = None):
    module = Bound()
    pruner = plp.StructuredPruning(plp.PROscore(), 0.5, target="macs", rounds=2, samples=SAMPLES)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto", callbacks=[pruner], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, tiny_loader(), tiny_loader(16), ckpt_path=ckpt)
    return module, pruner, trainer


if __name__ == "__main__":
    folder, size = sys.argv[1], int(sys.argv[2])
    first, pruner, trainer = cut(folder, size)
    file = f"{folder}/one.ckpt"
    trainer.save_checkpoint(file)
    again, _, _ = cut(folder, size, 2, file)
    state = {"cut": pruner.state_dict()["cuts"], "first": first.state_dict(), "again": again.state_dict()}
    torch.save(state, f"{folder}/rank{rank_and_size()[0]}.pt")
