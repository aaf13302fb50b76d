"""`neutral_norms`: a network with its normalisation layers taken out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pl_prune.core.sandbox import untouched

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Say whether a module normalises its input.

    Args:
        module: Any module; foreign ones are known by a class name that ends in Norm, Norm2d and the like.

    Returns:
        True for batch, instance, layer, group, RMS and local response norms.
    """
    return isinstance(module, _NORMS) or type(module).__name__.rstrip("123d").endswith("Norm")


@contextmanager
def batch_norms_in_training(model: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of their batch; everything is put back at the end, running statistics included.

    Args:
        model: The module, in evaluation mode otherwise.

    Yields:
        None.
    """
    with untouched(model):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = True
        yield


@contextmanager
def neutral_norms(model: nn.Module) -> Iterator[None]:
    """Make every norm layer the identity, for as long as the context lasts.

    Args:
        model: The module whose norms to neutralise.

    Yields:
        None.
    """
    norms = [m for m in model.modules() if is_norm(m)]
    saved = [m.__dict__.get("forward") for m in norms]

    def identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    try:
        for norm in norms:
            norm.__dict__["forward"] = identity
        yield
    finally:
        for norm, forward in zip(norms, saved, strict=True):
            if forward is None:
                norm.__dict__.pop("forward", None)
            else:
                norm.__dict__["forward"] = forward
