"""`initialise_`: new values for prunable weights, before scoring."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from pl_prune.core.types import Params

Init = Literal["normal", "xavier", "kaiming"]


@torch.no_grad()
def initialise_(params: Params, kind: Init, seed: int = 0) -> None:
    """Draw new weights in place, the same on every device and rank.

    Args:
        params: The parameters.
        kind: "normal" has standard deviation 0.01; "xavier" is Glorot's normal; "kaiming" is He's normal for ReLU over
            the fan-in.
        seed: Seed of a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in params.values():
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        if kind == "normal":
            nn.init.normal_(drawn, std=0.01, generator=generator)
        elif kind == "xavier":
            nn.init.xavier_normal_(drawn, generator=generator)
        else:
            nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
        parameter.copy_(drawn)
