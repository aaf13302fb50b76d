"""Cityscapes, read from its authors' folders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pl_prune.core.types import PruneError
from pl_prune.data.task_data import Part, TaskData

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORED = 255
"""The label of pixels that do not count."""


class Cityscapes(TaskData):
    """2,975 training and 500 validation images of streets, 2048x1024 pixels in 19 classes; the latter serve as test images.

    `root` holds leftImg8bit and gtFine; labels are the files gtFine_labelIds.png, from ids to the 19 classes of training,
    all else ignored. Training images are scaled, cropped (with a border where they are too small) and flipped at random;
    scoring sees the centre of the same size, validation the whole image. All are standardised by ImageNet's moments.

    Args:
        root: The folder that holds leftImg8bit and gtFine.
        crop_height: Height of the crop in pixels.
        crop_width: Width of the crop in pixels.
        min_scale: Lower end of the random scale.
        max_scale: Upper end of the random scale.
        batch_size: Crops per batch.
        eval_batch_size: Whole images per batch.
        workers: Processes that load.
        seed: Seed of the order.

    Raises:
        PruneError: If scales are not positive and in order, or the crop is empty.
    """

    def __init__(
        self,
        root: str = "data/cityscapes",
        crop_height: int = 769,
        crop_width: int = 769,
        min_scale: float = 0.5,
        max_scale: float = 2.0,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, eval_batch_size, workers, seed)
        if not 0 < min_scale <= max_scale or min(crop_height, crop_width) < 1:
            raise PruneError(
                f"Expected 0 < min_scale <= max_scale and a crop of one pixel or more; found {min_scale}, {max_scale} and "
                f"{crop_height}x{crop_width}. Scales of 0.5 and 2.0 are usual."
            )
        self.crop = (crop_height, crop_width)
        self.scales = (min_scale, max_scale)

    def open(self, part: Part) -> Any:
        """Open the images and their labels.

        Args:
            part: Which.

        Returns:
            A data set of (image, labels): (3, H, W) and (H, W).
        """
        from torchvision import datasets
        from torchvision.transforms import v2
        from torchvision.tv_tensors import Image, Mask

        last = [
            v2.ToDtype({Image: torch.float32, Mask: torch.int64}, scale=True),
            v2.Normalize(_MEAN, _STD),
            v2.ToPureTensor(),
        ]
        border = {Image: 0, Mask: IGNORED}
        steps = {
            "train": [
                _RandomScale(*self.scales),
                v2.RandomCrop(self.crop, pad_if_needed=True, fill=border),
                v2.RandomHorizontalFlip(),
            ],
            "scoring": [v2.CenterCrop(self.crop)],
        }
        return datasets.Cityscapes(
            self.root,
            split="train" if part in ("train", "scoring") else "val",
            target_type="semantic",
            transforms=v2.Compose([_Labelled(), *steps.get(part, []), *last]),
        )


class _Labelled:
    """Turn PIL images into tensors, and ids into classes."""

    def __init__(self) -> None:
        from torchvision.datasets import Cityscapes as Folders

        self.classes = torch.full((256,), IGNORED, dtype=torch.uint8)
        for known in Folders.classes:
            if known.id >= 0 and 0 <= known.train_id < IGNORED:
                self.classes[known.id] = known.train_id

    def __call__(self, image: Any, labels: Any) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2 import functional
        from torchvision.tv_tensors import Mask

        ids = functional.pil_to_tensor(labels)[0].long()
        return functional.to_image(image), Mask(self.classes[ids])


class _RandomScale:
    """Resize an image and its labels by one random factor."""

    def __init__(self, low: float, high: float) -> None:
        self.low = low
        self.high = high

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2 import functional

        factor = self.low + (self.high - self.low) * float(torch.rand(()))
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        return functional.resize(image, size), functional.resize(labels, size)
