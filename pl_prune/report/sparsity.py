"""What masks leave of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pl_prune.core.masks import MaskSet

BOTTLENECK = 0.8
"""A layer that lost at least this fraction is a bottleneck (Gollini Navarrete et al., Table A6)."""


@dataclass(frozen=True)
class LayerSparsity:
    """What is left of one parameter.

    Args:
        name: Parameter name.
        shape: Its shape.
        kept: Entries kept.
        total: Entries in all.
        empty_rows: Slices of dimension 0 (output channels) without a kept entry.
        empty_cols: Slices of dimension 1 (input channels) without a kept entry.
        kernel_sparsity: Fraction of (row, column) kernels of a convolution without a kept entry; None for a matrix.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    empty_rows: int
    empty_cols: int
    kernel_sparsity: float | None

    @property
    def density(self) -> float:
        """Kept fraction, in [0, 1]."""
        return self.kept / self.total if self.total else 1.0

    @property
    def collapsed(self) -> bool:
        """Whether nothing is left."""
        return self.kept == 0

    @property
    def bottleneck(self) -> bool:
        """Whether at least 80 % is gone, the empty layer included."""
        return self.total - self.kept >= BOTTLENECK * self.total


def layer_sparsity(masks: MaskSet) -> list[LayerSparsity]:
    """Measure every layer.

    Args:
        masks: What is kept.

    Returns:
        One entry for each parameter, in the masks' order.

    >>> import torch
    >>> layer_sparsity(MaskSet({"w": torch.tensor([[True, False], [False, False]])}))[0].empty_rows
    1
    """
    return [_measure(name, keep) for name, keep in masks.items()]


def _measure(name: str, keep: Tensor) -> LayerSparsity:
    matrix = keep.ndim > 1
    rows = keep.flatten(1).any(1) if matrix else keep
    cols = keep.transpose(0, 1).flatten(1).any(1) if matrix else keep
    kernels = keep.flatten(2).any(2) if keep.ndim > 2 else None
    return LayerSparsity(
        name=name,
        shape=tuple(keep.shape),
        kept=int(keep.sum()),
        total=keep.numel(),
        empty_rows=int((~rows).sum()),
        empty_cols=int((~cols).sum()),
        kernel_sparsity=None if kernels is None else 1 - float(kernels.double().mean()),
    )
