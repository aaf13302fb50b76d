"""CIFAR-10, CIFAR-100, SVHN and MNIST."""

from __future__ import annotations

from typing import Any, Literal

import torch

from pl_prune.core.types import PruneError
from pl_prune.data.images import Images


def _standardised(augmentation: list[Any], mean: tuple[float, ...], std: tuple[float, ...]) -> list[Any]:
    from torchvision.transforms import v2

    return [v2.ToImage(), *augmentation, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


class CIFAR(Images):
    """50,000 training and 10,000 test images of 32x32 pixels; the test set serves for validation too, as in the papers.

    Training images are cropped with padding and flipped; all are standardised.

    Args:
        root: Folder of torchvision's layout.
        classes: 10 or 100.
        batch_size: Samples per batch.
        workers: Processes that load.
        download: Whether to download what is missing.
        train_samples: Take only the first so many training images, in a fixed random order; None takes all.
        test_samples: The same of the test images.
        seed: Seed of the orders.
        image_size: Resize images to so many pixels a side; None leaves their size.
        channels: 1 (the mean over channels) or 3; None leaves them.
        labels: Only images of these classes, numbered anew in this order; None takes all.
        standardise: Whether to standardise; without, images are in [0, 1].
    """

    def __init__(
        self,
        root: str = "data",
        classes: int = 10,
        batch_size: int = 128,
        workers: int = 2,
        download: bool = False,
        train_samples: int | None = None,
        test_samples: int | None = None,
        seed: int = 0,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        labels: list[int] | None = None,
        standardise: bool = True,
    ) -> None:
        sizes = (batch_size, workers, download, train_samples, test_samples)
        super().__init__(root, *sizes, seed, image_size, channels, labels, standardise)
        if classes not in (10, 100):
            raise PruneError(f"Expected 10 or 100 classes; found {classes}. Choose one of them.")
        self.classes = classes

    def open(self, train: bool, transform: Any, download: bool) -> Any:
        """Open CIFAR-10 or CIFAR-100.

        Args:
            train: Whether it is the training images.
            transform: What to do to each image.
            download: Whether to download what is missing.

        Returns:
            A data set of (image, label).
        """
        from torchvision import datasets

        kind = datasets.CIFAR10 if self.classes == 10 else datasets.CIFAR100
        return kind(self.root, train=train, transform=transform, download=download)

    def transforms(self, augment: bool) -> list[Any]:
        """Crop out of four pixels of padding and flip, for training.

        Args:
            augment: Whether it is for training.

        Returns:
            Transforms.
        """
        from torchvision.transforms import v2

        steps = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if augment else []
        if self.classes == 10:
            return _standardised(steps, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        return _standardised(steps, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


class SVHN(Images):
    """73,257 training and 26,032 test images of house numbers, 32x32 pixels, 10 classes.

    Training images are cropped with padding and not flipped; all are standardised.
    """

    def open(self, train: bool, transform: Any, download: bool) -> Any:
        """Open SVHN.

        Args:
            train: Whether it is the training images.
            transform: What to do to each image.
            download: Whether to download what is missing.

        Returns:
            A data set of (image, label).
        """
        from torchvision import datasets

        return datasets.SVHN(self.root, split="train" if train else "test", transform=transform, download=download)

    def transforms(self, augment: bool) -> list[Any]:
        """Crop out of four pixels of padding, for training.

        Args:
            augment: Whether it is for training.

        Returns:
            Transforms.
        """
        from torchvision.transforms import v2

        steps = [v2.RandomCrop(32, padding=4)] if augment else []
        return _standardised(steps, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


class MNIST(Images):
    """60,000 training and 10,000 test images of handwritten digits, one channel of 28x28 pixels, standardised."""

    def open(self, train: bool, transform: Any, download: bool) -> Any:
        """Open MNIST.

        Args:
            train: Whether it is the training images.
            transform: What to do to each image.
            download: Whether to download what is missing.

        Returns:
            A data set of (image, label).
        """
        from torchvision import datasets

        return datasets.MNIST(self.root, train=train, transform=transform, download=download)

    def transforms(self, augment: bool) -> list[Any]:
        """Standardise; there is no augmentation.

        Args:
            augment: Without influence.

        Returns:
            Transforms.
        """
        return _standardised([], (0.1307,), (0.3081,))
