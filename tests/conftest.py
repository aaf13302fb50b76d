"""What many tests share: tiny networks, data and trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
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


@pytest.fixture
def fit(tmp_path: Any) -> Callable[..., tuple[TinyModule, Trainer]]:
    """Fit a module under callbacks and return it with its trainer."""

    def run(
        *callbacks: Any, module: LightningModule | None = None, ckpt_path: Any = None, seed: int = 3, **trainer: Any
    ):
        seed_everything(seed, verbose=False)
        module = TinyModule() if module is None else module
        settings: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        trainer_ = Trainer(**{**settings, **trainer}, callbacks=list(callbacks))
        trainer_.fit(module, tiny_loader(), tiny_loader(16), ckpt_path=ckpt_path)
        return module, trainer_

    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For fixtures of every scope, as sums are rounded by the number of threads; over tiny tensors threads only wait."""
    torch.set_num_threads(1)
