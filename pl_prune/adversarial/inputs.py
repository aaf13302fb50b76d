"""What attacks ask of images, labels and models, and the wrapper that brings the normalisation into the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.core.types import PruneError


class NormalizedModel(nn.Module):
    """Standardise images inside the model, so that attacks see them in [0, 1].

    Args:
        network: Maps standardised images to logits.
        mean: Of each channel.
        std: Of each channel.

    Shape:
        Input (N, C, H, W) in [0, 1]; output that of the network.

    >>> model = NormalizedModel(torch.nn.Flatten(), mean=[0.5], std=[0.25])
    >>> model(torch.tensor([[[[0.5, 1.0]]]]))
    tensor([[0., 2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or not all(s > 0 for s in std):
            raise PruneError(
                f"Expected a mean and a positive std for each channel; found mean={list(mean)!r} and std={list(std)!r}. "
                "Give both, in the units of images in [0, 1]."
            )
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise and run the network.

        Args:
            x: Images (N, C, H, W) in [0, 1].

        Returns:
            Logits.

        Raises:
            PruneError: If the images have another number of channels.
        """
        if x.ndim < 3 or x.shape[-3] != len(self.mean):
            raise PruneError(
                f"Expected images of {len(self.mean)} channels; found shape {tuple(x.shape)}. "
                "Give NormalizedModel one mean and one std for each channel."
            )
        return self.network((x - self.mean) / self.std)  # type: ignore[no-any-return]


def check_inputs(x: Any, y: Any) -> int:
    """Raise unless a batch can be attacked.

    Args:
        x: Images.
        y: Labels.

    Returns:
        The highest label.

    Raises:
        PruneError: If images are not floating-point numbers in [0, 1], or labels not one class index for each.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not len(x):
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise PruneError(f"Expected images as a floating-point tensor (N, ...); found {found}. Pass (images, labels).")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != x.shape[:1]:
        found = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise PruneError(
            f"Expected a class index for each of {len(x)} images; found {found}. Pass labels of integers, without mixup."
        )
    low, high, first, last = torch.stack([e.double() for e in (*x.detach().aminmax(), *y.aminmax())]).tolist()
    if not (low >= 0 and high <= 1):
        raise PruneError(
            f"Expected images in [0, 1], where eps is measured; found values from {low:.4g} to {high:.4g}. Take "
            "the normalisation out of the data (standardise: false in pl_prune's) and put it into the model, as "
            "NormalizedModel(network, mean, std)."
        )
    if first < 0:
        raise PruneError(f"Expected labels of 0 or more; found {first:.0f}. Number the classes from 0.")
    return int(last)


def logits_of(model: nn.Module, x: Tensor, highest: int) -> Tensor:
    """Run a model and check that it returns logits.

    Args:
        model: The model.
        x: Images (N, ...).
        highest: The highest label.

    Returns:
        Logits (N, classes).

    Raises:
        PruneError: If it returns something else, or has too few classes for the labels.
    """
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise PruneError(
            f"Expected {type(model).__name__} to map {len(x)} images to logits ({len(x)}, classes); found {found}. "
            "Let its forward return the logits alone."
        )
    if highest >= logits.shape[1]:
        raise PruneError(
            f"Expected labels from 0 to {logits.shape[1] - 1}, as the model has {logits.shape[1]} classes; found {highest}. "
            "Look at the labels, or at the model's number of classes."
        )
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every part of it back into its own mode at the end.

    Args:
        model: The model.

    Yields:
        None.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
