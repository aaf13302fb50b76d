"""CARN: cascading residual networks for super-resolution."""

from __future__ import annotations

from collections.abc import Callable
from math import log2

import torch
from torch import Tensor, nn

from pl_prune.core.types import PruneError

_MEAN = (0.4488, 0.4371, 0.4040)
"""Of DIV2K's training images, in [0, 1]."""


class CARN(nn.Module):
    """Ahn et al.'s network: residual blocks whose outputs cascade, within blocks and between them, and a pixel shuffle.

    Source: Ahn, Kang and Sohn, Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network (ECCV 2018),
    Figures 2 to 4. One network has one scale here, where theirs trains three together; with `groups` it has the efficient
    blocks of their CARN-M, without sharing weights between them.

    Args:
        scale: 2, 3 or 4: how many times as many pixels a side the outputs have.
        width: Channels.
        groups: Groups of the convolutions in residual blocks and before the shuffle; above 1, each residual block ends in a
            1x1 convolution.

    Raises:
        PruneError: If the scale is another one, or groups do not divide the width.
    """

    def __init__(self, scale: int = 2, width: int = 64, groups: int = 1) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise PruneError(f"Expected a scale of 2, 3 or 4; found {scale}. Choose one of them.")
        if width < 1 or groups < 1 or width % groups:
            raise PruneError(f"Expected groups that divide the width; found {groups} and {width}. Choose a multiple.")
        self.scale = scale
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.cascade = Cascade(width, lambda: Cascade(width, lambda: Residual(width, groups)))
        steps = []
        for _ in range(int(log2(scale)) if scale != 3 else 1):
            factor = 3 if scale == 3 else 2
            steps += [
                nn.Conv2d(width, width * factor**2, 3, padding=1, groups=groups),
                nn.ReLU(),
                nn.PixelShuffle(factor),
            ]
        self.upsample = nn.Sequential(*steps)
        self.exit = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return larger images.

        Args:
            x: Images (N, 3, H, W) in [0, 1].

        Returns:
            Images (N, 3, scale*H, scale*W), about in [0, 1].
        """
        return self.exit(self.upsample(self.cascade(self.entry(x - self.mean)))) + self.mean


class Cascade(nn.Module):
    """Three blocks, behind each a 1x1 convolution of the input and of all blocks' outputs so far.

    Args:
        width: Channels.
        block: Makes a block.
    """

    def __init__(self, width: int, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.fuse = nn.ModuleList(nn.Sequential(nn.Conv2d(width * (i + 2), width, 1), nn.ReLU()) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return features.

        Args:
            x: Features (N, width, H, W).

        Returns:
            The same shape.
        """
        seen = x
        for block, fuse in zip(self.blocks, self.fuse, strict=True):
            seen = torch.cat([seen, block(x)], 1)
            x = fuse(seen)
        return x


class Residual(nn.Module):
    """Two convolutions around which the input is added; a third one of 1x1 where they are grouped.

    Args:
        width: Channels.
        groups: Groups of the 3x3 convolutions.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        steps: list[nn.Module] = [nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.ReLU()]
        steps.append(nn.Conv2d(width, width, 3, padding=1, groups=groups))
        if groups > 1:
            steps += [nn.ReLU(), nn.Conv2d(width, width, 1)]
        self.body = nn.Sequential(*steps)
        self.out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return features.

        Args:
            x: Features (N, width, H, W).

        Returns:
            The same shape.
        """
        return self.out(self.body(x) + x)
