"""Run by `test_adversarial.py` in two processes: train adversarially, evaluate, save what each rank got."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_module import tiny_data

import pl_prune as plp
from pl_prune.core.sync import rank_and_size
from pl_prune.data.shuffle import EpochShuffle

EPS = 0.1


def data(n: int = 64) -> TensorDataset:
    x, y = tiny_data(n).tensors
    return TensorDataset(x.sigmoid(), y)


def loader(n: int = 64, batch_size: int = 16) -> DataLoader:
    return DataLoader(data(n), batch_size, sampler=EpochShuffle(data(n)))


class Classifier(LightningModule):
    """A classifier of a kind that no test of ours was written for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8 * 64, 4),
        )
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x)
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)


def trainer_of(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**defaults, **settings}, callbacks=list(callbacks))


def evaluated(folder: Path, module: LightningModule, **settings: Any) -> plp.RobustnessEvaluation:
    evaluation = plp.RobustnessEvaluation(eps=0.02, preset="fast", images=50, chunk_size=16, folder=str(folder))
    trainer_of(folder, evaluation, **settings).test(module, loader(), verbose=False)
    return evaluation


def main(out: Path) -> None:
    two = {"devices": 2, "strategy": "ddp"}
    evaluation = evaluated(out / "evaluation", Classifier(), **two)
    module = Classifier()
    trainer = trainer_of(out, plp.AdversarialTraining(plp.TRADES(EPS, EPS / 4, 3)), **two)
    trainer.fit(module, loader(), loader(16))
    rank, _ = rank_and_size()
    result = {
        "weights": dict(module.named_parameters()),
        "step": "training_step" in vars(module),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "flags": list(evaluation.result.flags),
        "robust": evaluation.result.robust,
    }
    torch.save(result, out / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
