"""A tiny network that no callback was written for, and its data."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_prune.data.shuffle import EpochShuffle


class TinyModule(LightningModule):
    """A small conv net with BN and dropout, of a kind that no test of ours was written for."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 16),
            nn.Dropout(0.1),
            nn.ReLU(),
            nn.Linear(16, 4),
        )
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.seen.append(float(x.double().sum()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def tiny_data(n: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 4)


def tiny_loader(n: int = 64, batch_size: int = 16) -> DataLoader:
    data = tiny_data(n)
    return DataLoader(data, batch_size, sampler=EpochShuffle(data))
