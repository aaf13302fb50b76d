"""Run by `test_score_sharpness.py` in two processes: learn scores, save what each rank measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_module import TinyModule, tiny_loader

import pl_prune as plp
from pl_prune.core.sync import rank_and_size


def main(out: Path) -> None:
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            plp.ScoreSharpness(iterations=3, rhos=(0.01, 0.1), samples=plp.Samples(total=24, batch_size=16)),
            plp.S2AP(0.7, gamma=0.05, warmup_epochs=0),
        ],
    )
    trainer.fit(TinyModule(), tiny_loader())
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("s")}
    (out / f"rank{rank_and_size()[0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
