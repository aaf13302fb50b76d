"""Rewinding: a network that goes back to what it was at an earlier step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Adagrad, Optimizer

from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.bridge import Bridge
from pl_prune.core.types import PruneError


def snapshot(module: LightningModule) -> dict[str, Tensor]:
    """Copy a module's parameters and buffers.

    Args:
        module: The module.

    Returns:
        Tensors by name.
    """
    return {name: t.detach().clone() for name, t in _tensors(module).items()}


@torch.no_grad()
def rewind(bridge: Bridge, origin: Mapping[str, Tensor], pruning: Iterable[PruningCallback]) -> None:
    """Put a module back, masked as it is now, and let its optimizers start anew.

    Args:
        bridge: The module and its trainer.
        origin: What `snapshot` returned.
        pruning: The pruning callbacks, whose zeros stay.

    Raises:
        PruneError: If the module has other tensors now.
    """
    state = _tensors(bridge.pl_module)
    for name, value in origin.items():
        if name not in state or state[name].shape != value.shape:
            raise PruneError(
                f"Expected the module to hold {name!r} of shape {tuple(value.shape)}, to rewind it; found "
                f"{tuple(state[name].shape) if name in state else 'none'}. Resume with the network that the run began with."
            )
        state[name].copy_(value)
    for callback in pruning:
        if callback.masks is not None:
            callback.masks.apply_(state)
    for optimizer in bridge.trainer.optimizers:
        _forget(optimizer)


def _tensors(module: LightningModule) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _forget(optimizer: Optimizer) -> None:
    """Clear the state; `Adagrad` makes its own when it is built, in some versions of PyTorch."""
    if not isinstance(optimizer, Adagrad):
        optimizer.state.clear()
        return
    for group in optimizer.param_groups:
        for state in (optimizer.state[p] for p in group["params"] if p in optimizer.state):
            state["sum"].fill_(group["initial_accumulator_value"])
            state["step"].zero_()
