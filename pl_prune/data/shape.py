"""Images brought to one shape, and classes chosen among a data set's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pl_prune.core.types import PruneError


def to_shape(image_size: int | None, channels: Literal[1, 3] | None) -> list[Callable[[Tensor], Tensor]]:
    """Say what brings images to a shape.

    Args:
        image_size: Pixels a side; None leaves them.
        channels: 1 (the mean) or 3 (repeated); None leaves them.

    Returns:
        Functions of images (..., C, H, W), to be called in this order.

    Raises:
        PruneError: If there is no such shape.
    """
    steps: list[Callable[[Tensor], Tensor]] = []
    if image_size is not None:
        if image_size < 1:
            raise PruneError(
                f"Expected image_size of 1 pixel or more; found {image_size}. Leave it out for the own size."
            )
        from torchvision.transforms.v2 import Resize

        steps.append(Resize((image_size, image_size), antialias=True))
    if channels is not None:
        if channels not in (1, 3):
            raise PruneError(f"Expected 1 or 3 channels; found {channels}. Leave it out for the own ones.")
        steps.append(_Channels(channels))
    return steps


class _Channels:
    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-3] == self.count:
            return x
        return x.mean(-3, keepdim=True).expand(*x.shape[:-3], self.count, *x.shape[-2:])


class OfClasses(Dataset):
    """The samples of some classes, numbered anew.

    Args:
        data: A data set of (image, label) with its labels under `targets` or `labels`.
        labels: The classes, in their new order.

    Raises:
        PruneError: If a class is named twice, or is not there.
    """

    def __init__(self, data: Any, labels: Sequence[int]) -> None:
        found = torch.as_tensor(data.targets if hasattr(data, "targets") else data.labels)
        present = set(found.unique().tolist())
        odd = [label for label in labels if label not in present or list(labels).count(label) > 1]
        if odd or not labels:
            raise PruneError(
                f"Expected labels to name classes of the data, each once; found {list(labels)}, of {len(present)} classes from "
                f"{min(present)} to {max(present)}. Leave it out for all classes."
            )
        self.data = data
        number = {label: place for place, label in enumerate(labels)}
        self.places = torch.isin(found, torch.tensor(list(labels))).nonzero().flatten().tolist()
        self.targets = [number[int(found[place])] for place in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.data[self.places[index]][0], self.targets[index]
