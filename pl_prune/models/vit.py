"""A vision transformer for small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_prune.core.types import PruneError


class Attention(nn.Module):
    """Multi-head self-attention with one projection to queries, keys and values.

    Args:
        width: Features of a token.
        heads: Number of heads; divides the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens.

        Args:
            x: Tokens (N, T, width).

        Returns:
            Tokens (N, T, width).
        """
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and two linear layers, each behind a layer norm and beside a shortcut.

    Args:
        width: Features of a token.
        heads: Number of heads.
        hidden: Features between the two linear layers.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Tokens (N, T, width).

        Returns:
            Tokens (N, T, width).
        """
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer: patches as tokens, blocks of attention, the mean of all tokens to the logits.

    Args:
        depth: Number of blocks.
        width: Features of a token.
        heads: Attention heads of each block; divides the width.
        patch: Side of a patch in pixels; divides the image's side.
        image: Side of the images in pixels.
        num_classes: Number of logits.
        mlp_ratio: Features between the two linear layers of a block, as a multiple of the width.

    Shape:
        Input (N, 3, image, image); output (N, num_classes).

    Source:
        Dosovitskiy et al., An image is worth 16x16 words. Divergence: as usual for small data, the mean of the tokens
        takes the place of a class token; hidden layers are twice as wide as a token by default.
    """

    def __init__(
        self,
        depth: int = 8,
        width: int = 192,
        heads: int = 6,
        patch: int = 4,
        image: int = 32,
        num_classes: int = 10,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__()
        if width % heads or image % patch:
            raise PruneError(
                f"Expected heads that divide the width and patches that divide the image; found {heads} heads of {width} features "
                f"and patches of {patch} in images of {image} pixels. Change one of each."
            )
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.empty(1, (image // patch) ** 2, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, mlp_ratio * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images.

        Returns:
            Logits.
        """
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))
