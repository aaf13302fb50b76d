"""Small networks and images in [0, 1], in double precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, classes)
    ).double()
    net(torch.rand(64, 1, 6, 6, dtype=torch.float64))  # batch norms have seen data
    return net


def images(n: int = 12, classes: int = 4, kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(n, 1, 6, 6, generator=generator, dtype=kind)
    x[0] = 0
    x[1] = 1
    return x, torch.arange(n) % classes


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.map = nn.Linear(36, classes)
        nn.init.normal_(self.map.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x.flatten(1))

    def stands(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """Whether no image within eps and in [0, 1] is classified otherwise: the smallest margin over the ball, in closed form."""
        flat, weight, bias = x.double().flatten(1), self.map.weight.double(), self.map.bias.double()
        stands = torch.ones(len(x), dtype=torch.bool)
        for i, label in enumerate(y.tolist()):
            for other in range(len(bias)):
                if other != label:
                    d = weight[label] - weight[other]
                    reach = torch.where(d > 0, flat[i], 1 - flat[i]).clamp(max=eps)
                    stands[i] &= bool(d @ flat[i] + bias[label] - bias[other] - (d.abs() * reach).sum() > 0)
        return stands
