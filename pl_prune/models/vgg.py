"""VGG with batch norm, for small images."""

from __future__ import annotations

from torch import Tensor, nn

from pl_prune.core.types import PruneError

_STAGES = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG-16 or VGG-19 with batch norm: 3x3 convolutions in five stages, max pooling between them, one linear layer.

    Args:
        depth: 16 or 19.
        num_classes: Number of logits.

    Shape:
        Input (N, 3, 32, 32) or larger; output (N, num_classes).

    Source:
        Simonyan and Zisserman, Very deep convolutional networks, configurations D and E. Divergence: as usual for
        32x32 images, the three linear layers are
        one after global average pooling.
    """

    def __init__(self, depth: int = 19, num_classes: int = 10) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise PruneError(f"Expected a depth of 16 or 19; found {depth}. Choose one of them.")
        layers: list[nn.Module] = []
        channels = 3
        for i, (count, width) in enumerate(zip(_STAGES[depth], _WIDTHS, strict=True)):
            if i:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images.

        Returns:
            Logits.
        """
        return self.fc(self.features(x).mean((2, 3)))
