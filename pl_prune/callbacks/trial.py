"""`Trial`: the point of CRIC in the place of a module's weights, while a batch runs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from pl_prune.core.types import plain
from pl_prune.optim.hesso import Hesso


class Trial:
    """Put the point of CRIC into a module before a batch, and weights and buffers back behind its backward pass.

    Args:
        hesso: What knows the point.
        pl_module: The module.
    """

    def __init__(self, hesso: Hesso, pl_module: LightningModule) -> None:
        self._hesso, self._module = hesso, pl_module
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def enter(self) -> None:
        """Put the point in place, if CRIC is due."""
        if self._hesso.enter():
            self._buffers = [(buffer, buffer.detach().clone()) for buffer in self._module.buffers()]

    def leave(self) -> None:
        """Put weights and buffers back; may be called twice."""
        self._hesso.leave()
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        self._buffers = []

    def correct(self, checkpoint: dict[str, Any]) -> None:
        """Write the weights and buffers into a checkpoint that was made while the point is in their place.

        Args:
            checkpoint: The whole checkpoint.
        """
        held = dict(self._hesso.weights())
        if not held:
            return
        values = {id(buffer): value for buffer, value in self._buffers}
        held.update({plain(n): values[id(b)] for n, b in self._module.named_buffers() if id(b) in values})
        state = checkpoint.get("current_model_state", checkpoint["state_dict"])  # beside an average, where there is one
        state.update({name: held[plain(name)].clone() for name in state if plain(name) in held})
