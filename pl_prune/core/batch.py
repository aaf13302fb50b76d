"""Batches: how many samples one holds, and how to take some of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pl_prune.core.types import PruneError


def batch_size(batch: Any) -> int:
    """Return the number of samples of a batch.

    That is the first dimension of its first tensor; where inputs and targets are lists of one item a sample, as
    detectors take them, the length of those.

    Args:
        batch: Tensors in any nesting of tuples, lists and dicts.

    Returns:
        The number of samples.

    Raises:
        PruneError: If no tensor has a dimension.
    """
    listed = _listed(batch)
    if listed is not None:
        return listed
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise PruneError(
        f"Expected a batch that holds a tensor whose first dimension counts samples; found {type(batch).__name__}. "
        "Pass batches of tensors."
    )


def cut(batch: Any, size: int, start: int, stop: int) -> Any:
    """Cut samples out of a batch.

    Args:
        batch: Tensors in any nesting.
        size: Number of samples.
        start: First sample.
        stop: One past the last sample.

    Returns:
        A batch in which everything that counted samples has `stop - start`.
    """
    return pick(batch, size, torch.arange(start, min(stop, size)))


def pick(batch: Any, size: int, samples: Tensor) -> Any:
    """Pick samples out of a batch.

    Args:
        batch: Tensors in any nesting.
        size: Number of samples.
        samples: Their places (n,).

    Returns:
        A batch in which everything that counted samples has n.
    """
    if _listed(batch) == size:
        parts = [
            part[samples.to(part.device)] if isinstance(part, Tensor) else [part[i] for i in samples.tolist()]
            for part in batch
        ]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return tree_map(
        lambda x: x[samples.to(x.device)] if isinstance(x, Tensor) and x.ndim and x.shape[0] == size else x, batch
    )


def _listed(batch: Any) -> int | None:
    """Return the number of samples of a batch (inputs, targets, ...) of lists with one item for each, else None."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return None
    if not all(isinstance(part, (tuple, list)) or (isinstance(part, Tensor) and part.ndim) for part in batch):
        return None
    lengths = {len(part) for part in batch}
    if len(lengths) != 1 or all(isinstance(part, Tensor) for part in batch):
        return None
    (length,) = lengths
    leaves = tree_leaves(batch)
    firsts = {leaf.shape[:1] for leaf in leaves if isinstance(leaf, Tensor)}
    stacked = len(firsts) == 1 and (firsts == {(length,)} or all(isinstance(leaf, Tensor) for leaf in leaves))
    return None if stacked else length
