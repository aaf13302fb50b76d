"""A small convolutional network, for examples and tests."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three convolutions with batch norm, global average pooling and a linear head.

    Args:
        in_channels: Channels of the input image.
        num_classes: Number of logits.
        width: Channels of the first convolution; the others have twice and four times as many.

    Shape:
        Input (N, in_channels, H, W) with H and W of 4 or more; output (N, num_classes).
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        widths = [in_channels, width, 2 * width, 4 * width]
        blocks: list[nn.Module] = []
        for i in range(3):
            blocks += [
                nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, stride=1 if i == 0 else 2, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images.

        Returns:
            Logits.
        """
        return self.head(self.features(x).mean((2, 3)))
