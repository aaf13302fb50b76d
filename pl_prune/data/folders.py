"""TinyImageNet and ImageNet, read from folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from pl_prune.core.types import PruneError
from pl_prune.data.images import Images

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _classes(folder: str, root: str) -> Any:
    from torchvision.datasets.folder import find_classes

    try:
        return find_classes(folder)
    except FileNotFoundError as error:
        raise PruneError(
            f"Expected one folder of images for each class in {folder!r}; found none ({error}). "
            f"Set data.init_args.root, now {root!r}, to the folder that holds train and val."
        ) from error


class TinyImageNet(Images):
    """100,000 training and 10,000 validation images of 64x64 pixels in 200 classes; the latter serve as test images.

    Training images are cropped with padding and flipped; all are standardised by ImageNet's moments.

    `root` is the folder tiny-imagenet-200 of the authors' archive: train, val and val/val_annotations.txt.
    """

    downloadable: ClassVar[bool] = False

    def open(self, train: bool, transform: Any, download: bool) -> Any:
        """Open the folder.

        Args:
            train: Whether it is the training images.
            transform: What to do to each image.
            download: Without influence.

        Returns:
            A data set of (image, label).

        Raises:
            PruneError: If the annotations name an unknown class.
        """
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import default_loader

        root = Path(self.root)
        _, index = _classes(str(root / "train"), self.root)
        if train:
            return ImageFolder(str(root / "train"), transform)
        lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
        rows = [line.split("\t")[:2] for line in lines if line]
        odd = [row for row in rows if row[1] not in index]
        if odd:
            raise PruneError(
                f"Expected classes of {self.root}/train in val_annotations.txt; found {odd[0][1]!r} for {odd[0][0]!r}. "
                "Unpack the archive anew."
            )
        return _Listed(
            [(root / "val" / "images" / name, index[label]) for name, label in rows], transform, default_loader
        )

    def transforms(self, augment: bool) -> list[Any]:
        """Crop out of eight pixels of padding and flip, for training.

        Args:
            augment: Whether it is for training.

        Returns:
            Transforms.
        """
        from torchvision.transforms import v2

        steps = [v2.RandomCrop(64, padding=8), v2.RandomHorizontalFlip()] if augment else []
        return [v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]


class ImageNet(Images):
    """Any ImageNet-like folder: train/CLASS/IMAGE and val/CLASS/IMAGE; the validation images serve as test images.

    Training images are random resized crops, flipped; others are resized and cropped at the centre.

    Args:
        root: The folder that holds train and val.
        size: Side of the crop in pixels.
        batch_size: Samples per batch.
        workers: Processes that load.
        download: Refused: torchvision cannot.
        train_samples: Take only the first so many training images, in a fixed random order; None takes all.
        test_samples: The same of the validation images.
        seed: Seed of the orders.
        standardise: Whether to standardise; without, images are in [0, 1].
    """

    downloadable: ClassVar[bool] = False

    def __init__(
        self,
        root: str = "data",
        size: int = 224,
        batch_size: int = 128,
        workers: int = 2,
        download: bool = False,
        train_samples: int | None = None,
        test_samples: int | None = None,
        seed: int = 0,
        standardise: bool = True,
    ) -> None:
        sizes = (batch_size, workers, download, train_samples, test_samples)
        super().__init__(root, *sizes, seed, standardise=standardise)
        self.size = size

    def open(self, train: bool, transform: Any, download: bool) -> Any:
        """Open the folder.

        Args:
            train: Whether it is the training images.
            transform: What to do to each image.
            download: Without influence.

        Returns:
            A data set of (image, label).

        Raises:
            PruneError: If the classes of train and val differ.
        """
        from torchvision.datasets import ImageFolder

        known = [_classes(str(Path(self.root) / part), self.root)[0] for part in ("train", "val")]
        if known[0] != known[1]:
            odd = sorted(set(known[0]) ^ set(known[1]))
            raise PruneError(
                f"Expected the same classes in {self.root}/train and {self.root}/val, or labels would mean different classes; "
                f"found {odd[0]!r} in one alone. Sort the validation images into folders of their classes."
            )
        return ImageFolder(str(Path(self.root) / ("train" if train else "val")), transform)

    def transforms(self, augment: bool) -> list[Any]:
        """Crop at random and flip, for training; else resize to 8/7 of the side and crop at the centre.

        Args:
            augment: Whether it is for training.

        Returns:
            Transforms.
        """
        from torchvision.transforms import v2

        steps = (
            [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip()]
            if augment
            else [v2.Resize(self.size * 8 // 7), v2.CenterCrop(self.size)]
        )
        return [v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]


class _Listed(torch.utils.data.Dataset[Any]):
    """Images and labels from a list."""

    def __init__(self, rows: list[tuple[Path, int]], transform: Any, load: Any) -> None:
        self.rows = rows
        self.targets = [label for _, label in rows]
        self.transform = transform
        self.load = load

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.rows[index]
        return self.transform(self.load(str(path))), label
