"""Networks that other people wrote, each in the LightningModule that a user would write around it, with random data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torchvision.models as tv
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import boring_classes, lstm, transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models.convnext import CNBlockConfig

CLASSES = 4


class Entry(NamedTuple):
    """A module, and its training data where it has none of its own."""

    module: LightningModule
    loader: DataLoader[Any] | None = None


class Classifier(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Detector(LightningModule):
    """The losses of torchvision's detectors exist in training mode only, so scoring has a step of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        return sum(self.network(images, targets).values())

    def scoring_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.network.train()
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


class TextClassifier(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Tokens(Dataset[Any]):
    """Random tokens in the place of `WikiText2`."""

    vocab_size = 50

    def __init__(self, download: bool = True) -> None:
        self.data = torch.randint(self.vocab_size, (40, 9))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index, :-1], self.data[index, 1:]


class Examples(Dataset[Any]):
    """Samples of any form, made beforehand."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def images(size: int = 32, channels: int = 3) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, channels, size, size), torch.arange(8) % CLASSES), batch_size=4)


def scenes() -> DataLoader[Any]:
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 50.0]])
    samples = [(torch.rand(3, 64, 64), {"boxes": boxes, "labels": torch.tensor([1, 2])}) for _ in range(8)]
    return DataLoader(Examples(samples), batch_size=4, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))


def sentences() -> DataLoader[Any]:
    samples = [
        {"input_ids": torch.randint(50, (8,)), "attention_mask": torch.ones(8).long(), "labels": torch.tensor(i % 2)}
        for i in range(8)
    ]
    return DataLoader(Examples(samples), batch_size=4)
