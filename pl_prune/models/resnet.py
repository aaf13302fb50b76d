"""Residual networks for small and large images."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pl_prune.core.types import PruneError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of both convolutions.
        stride: Stride of the first.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Feature maps.

        Returns:
            Feature maps.
        """
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution beside a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the 3x3 convolution; the output has four times as many.
        stride: Stride of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut = _shortcut(in_channels, 4 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Feature maps.

        Returns:
            Feature maps.
        """
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


_PLANS: dict[int, tuple[type[nn.Module], list[int], int]] = {
    18: (BasicBlock, [2, 2, 2, 2], 64),
    34: (BasicBlock, [3, 4, 6, 3], 64),
    50: (Bottleneck, [3, 4, 6, 3], 64),
    101: (Bottleneck, [3, 4, 23, 3], 64),
    20: (BasicBlock, [3, 3, 3], 16),
    32: (BasicBlock, [5, 5, 5], 16),
    56: (BasicBlock, [9, 9, 9], 16),
}


class ResNet(nn.Module):
    """ResNet-18, 34, 50 and 101 (four stages from 64 channels), and the thin ResNet-20, 32 and 56 (three stages from 16).

    Args:
        depth: 18, 20, 32, 34, 50, 56 or 101.
        num_classes: Number of logits.
        stem: "cifar" is a 3x3 convolution; "imagenet" a 7x7 of stride 2 and max pooling.

    Shape:
        Input (N, 3, H, W); output (N, num_classes).

    Source:
        He et al., Deep residual learning for image recognition, section 4.2 for the thin ones. Divergence: their
        shortcuts are 1x1
        convolutions with batch norm too, where the paper pads with zeros.
    """

    def __init__(self, depth: int = 18, num_classes: int = 10, stem: Literal["cifar", "imagenet"] = "cifar") -> None:
        super().__init__()
        if depth not in _PLANS:
            raise PruneError(f"Expected a depth among {sorted(_PLANS)}; found {depth}. Choose one of them.")
        block, stages, width = _PLANS[depth]
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        channels = width
        layers = []
        for i, blocks in enumerate(stages):
            for j in range(blocks):
                layers.append(block(channels, width << i, 2 if i and not j else 1))
                channels = (width << i) * block.expansion
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images.

        Returns:
            Logits.
        """
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.blocks(x).mean((2, 3)))


class WideResNet(nn.Module):
    """A pre-activation residual network of three wide stages.

    Args:
        depth: 6 n + 4; 28 in the papers.
        widen: Width factor; 4 or 10 in the papers.
        num_classes: Number of logits.

    Shape:
        Input (N, 3, H, W); output (N, num_classes).

    Source:
        Zagoruyko and Komodakis, Wide residual networks. No dropout.
    """

    def __init__(self, depth: int = 28, widen: int = 4, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise PruneError(f"Expected a depth of 6 n + 4; found {depth}. Use 28, or 16, 22, 40.")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        channels, layers = 16, []
        for i in range(3):
            for j in range((depth - 4) // 6):
                layers.append(PreActivationBlock(channels, (16 << i) * widen, 2 if i and not j else 1))
                channels = (16 << i) * widen
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images.

        Returns:
            Logits.
        """
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class PreActivationBlock(nn.Module):
    """Norm, ReLU and convolution, twice, beside a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = in_channels == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Feature maps.

        Returns:
            Feature maps.
        """
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if in_channels == channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
