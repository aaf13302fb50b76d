"""Averaged copies of a module's weights, which must be as sparse as the weights."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError


def prune_averages(trainer: Trainer, pl_module: LightningModule, masks: MaskSet, fresh: bool) -> None:
    """Zero the pruned weights of every averaged copy, which then stay zero, since the average of zeros is zero.

    Args:
        trainer: The trainer.
        pl_module: Its module, pruned.
        masks: The masks in force.
        fresh: The module starts its training now: its copies start from the same weights and buffers.

    Raises:
        PruneError: If a callback averages zeros to something else.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        copy = _copy(callback)
        if copy is None:
            continue
        if not _keeps_zeros(callback):
            raise PruneError(
                f"Expected {type(callback).__name__} to average zeros to zero, or its average would not stay pruned; found that "
                "its avg_fn does not. Use EMAWeightAveraging, or an average of another kind."
            )
        params = dict(copy.named_parameters())
        if fresh:
            live = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
            with torch.no_grad():
                for name, averaged in chain(params.items(), copy.named_buffers()):
                    averaged.copy_(live[name])
            _count(callback)
        masks.to(next(iter(params.values())).device).apply_(params)


def _copy(callback: Any) -> nn.Module | None:
    if not isinstance(callback, (WeightAveraging, StochasticWeightAveraging)) or callback._average_model is None:
        return None
    average = callback._average_model
    return average.module if isinstance(callback, WeightAveraging) else average


def _count(callback: Any) -> None:
    """Let an average count from here on what it averages."""
    counter = callback._average_model.n_averaged if isinstance(callback, WeightAveraging) else callback.n_averaged
    if counter is not None:
        counter.zero_()


def _keeps_zeros(callback: Any) -> bool:
    old, new, count = torch.zeros(2), torch.zeros(2), torch.tensor(1)
    if isinstance(callback, StochasticWeightAveraging):
        averaged = callback._avg_fn(old, new, count)
    elif callback._average_model.multi_avg_fn is not None:
        listed: list[Tensor] = [old]
        callback._average_model.multi_avg_fn(listed, [new], count)
        averaged = listed[0]
    elif callback._average_model.avg_fn is not None:
        averaged = callback._average_model.avg_fn(old, new, count)
    else:
        return True
    return not bool(averaged.any())
