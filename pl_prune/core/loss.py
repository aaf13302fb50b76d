"""What a user's loss, logits and batches must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pl_prune.core.batch import batch_size, cut
from pl_prune.core.types import PruneError

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""`loss(model, batch)`: the mean loss of a batch."""


def checked_loss(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss of a batch.

    Args:
        loss: The user's loss.
        model: The network.
        batch: The batch.

    Returns:
        A finite scalar with a gradient.

    Raises:
        PruneError: If the loss is anything else.
    """
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        found = (
            f"a tensor of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else f"{value!r}"
        )
        raise PruneError(
            f"Expected the loss of a batch to be a scalar tensor, its mean; found {found}. Reduce it with `.mean()`."
        )
    if not value.isfinite():
        if not batch_size(batch):
            raise PruneError("Expected batches of at least one sample; found an empty one. Leave it out.")
        raise PruneError(
            f"Expected a finite loss; found {value.item()}. Look at the inputs and at the initial weights; "
            "a loss that overflows in half precision needs float32 weights."
        )
    if not value.requires_grad:
        raise PruneError(
            "Expected a loss that depends on the prunable parameters; found one without a gradient. "
            "Remove `detach` or `no_grad`."
        )
    return value.reshape(())


def check_separable(loss: Loss, model: nn.Module, batch: Any, size: int) -> None:
    """Raise unless the loss of the first eight samples is the mean of their own losses.

    Args:
        loss: The user's loss.
        model: The network.
        batch: The batch.
        size: Number of samples of the batch.

    Raises:
        PruneError: If samples interact.
    """
    count = min(size, 8)
    together = loss(model, cut(batch, size, 0, count)).detach()
    alone = [float(loss(model, cut(batch, size, i, i + 1)).detach()) for i in range(count)]
    mean = sum(alone) / max(count, 1)
    tolerance = max(1e-3, 8 * torch.finfo(together.dtype).eps)
    if count > 1 and abs(float(together) - mean) > tolerance * max(abs(float(together)), *map(abs, alone)):
        raise PruneError(
            f"Expected the loss of a batch to be the mean of its samples' losses, for a per-sample criterion; "
            f"found {float(together):.6g} for {count} samples whose own losses have the mean {mean:.6g} "
            "(class weights, a contrastive loss, batch norm in training mode). "
            "Use a criterion of the mean gradient (SNIP, GradNorm), or per_sample=False."
        )


def class_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of a batch and its class labels.

    Args:
        model: Maps inputs to logits.
        batch: `(inputs, labels)`.

    Returns:
        Logits (N, C) and labels (N,).

    Raises:
        PruneError: If the batch is of another form, or the model does not map its inputs to class logits.
    """
    advice = "Use SNIP, GradNorm or a Fisher criterion, or GraSP or Hutchinson with temperature=1.0, which need the loss alone."
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        parts = ", ".join(type(part).__name__ for part in batch) if isinstance(batch, (tuple, list)) else ""
        raise PruneError(
            "Expected batches of (inputs, labels), since this criterion needs logits; "
            f"found {type(batch).__name__}{f' of {parts}' if parts else ''}. {advice}"
        )
    inputs, labels = batch[0], batch[1]
    try:
        logits = model(inputs)
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise PruneError(
            f"Expected {type(model).__name__}.forward(inputs) to return logits; "
            f"found {type(error).__name__}: {error}. {advice}"
        ) from error
    classes = isinstance(logits, Tensor) and logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point()
    if not classes or len(logits) != len(labels):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise PruneError(
            f"Expected logits (N, C) and integer labels (N,); found {found} and {tuple(labels.shape)} {labels.dtype}. {advice}"
        )
    return logits, labels
