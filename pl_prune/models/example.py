"""Images on which a network is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from pl_prune.core.types import check_count


def example_images(size: int) -> Tensor:
    """Return two random images, the same ones each time.

    Args:
        size: Pixels a side.

    Returns:
        Images (2, 3, size, size) in [0, 1].

    Raises:
        PruneError: If it is not a whole number of 1 or more.
    """
    check_count("example_size", size)
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
