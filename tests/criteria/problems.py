"""Two small networks with data, on which every criterion is checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Problem:
    """A network and seven samples of three classes."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def batches(self, *sizes: int) -> list[tuple[Tensor, Tensor]]:
        assert sum(sizes) == len(self.x)
        return list(zip(self.x.split(sizes), self.y.split(sizes), strict=True))

    @staticmethod
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def mlp(dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    return _with_data(model, (6,), dtype)


def convnet(dtype: torch.dtype = torch.float64) -> Problem:
    """A conv net whose batch norms have seen other data, and have scales and shifts of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(24, 3),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return _with_data(model, (2, 6, 6), dtype)


def _with_data(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Problem(model.to(dtype), x.to(dtype), torch.arange(7) % 3)


PROBLEMS = {"mlp": mlp, "convnet": convnet}
CUTS = [(7,), (3, 3, 1), (1, 1, 1, 1, 1, 1, 1), (5, 2)]
