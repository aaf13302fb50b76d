"""`NormSGD`: SGD with settings of its own for the norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pl_prune.core.types import PruneError


class NormSGD(torch.optim.SGD):
    """SGD in which scales and shifts of norms have a weight decay, and a momentum, of their own.

    The command line hands an optimizer bare parameters, without the layers that they are of: what has one dimension
    counts as a norm's. So biases do too.

    Args:
        params: Parameters, not groups of them.
        lr: Learning rate of all.
        momentum: Of matrices and kernels.
        weight_decay: Of matrices and kernels.
        norm_weight_decay: Of parameters of one dimension; None takes `weight_decay`.
        norm_momentum: Of parameters of one dimension; None takes `momentum`.

    Raises:
        PruneError: If groups are passed, or a setting of the norms is negative.

    Source:
        IPPRO, appendix B.1: a norm weight decay of 5e-5 for ResNet-50, "and the momentum was 0", which is read here as that of
        the norms.

    >>> from torch import nn
    >>> layers = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
    >>> [g["weight_decay"] for g in NormSGD(layers.parameters(), 0.01, 0.9, 1e-4, 5e-5).param_groups]
    [0.0001, 5e-05]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        norm_weight_decay: float | None = None,
        norm_momentum: float | None = None,
    ) -> None:
        params = list(params)
        odd = next((p for p in params if not isinstance(p, Tensor)), None)
        if odd is not None:
            raise PruneError(
                f"Expected parameters; found {type(odd).__name__}. Pass model.parameters(); groups are made here."
            )
        own: dict[str, Any] = {"weight_decay": norm_weight_decay, "momentum": norm_momentum}
        own = {name: value for name, value in own.items() if value is not None}
        for name, value in own.items():
            if value < 0:
                raise PruneError(
                    f"Expected norm_{name} of 0 or more; found {value}. Leave it out for that of the others."
                )
        groups = [
            {"params": [p for p in params if p.ndim != 1]},
            {"params": [p for p in params if p.ndim == 1], **own},
        ]
        filled = [group for group in groups if group["params"]]
        super().__init__(filled, lr, momentum=momentum, weight_decay=weight_decay)
