"""What the data modules of images share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from pl_prune.core.types import PruneError
from pl_prune.data.shape import OfClasses, to_shape
from pl_prune.data.shuffle import EpochShuffle


class Images(LightningDataModule, ABC):
    """Training and test images read by torchvision; the test images serve for validation too, as in the papers.

    A data set is a subclass that says how its images are opened and prepared.

    Args:
        root: Folder of the data.
        batch_size: Samples per batch.
        workers: Processes that load.
        download: Whether to download what is missing.
        train_samples: Take only the first so many training images, in a fixed random order; None takes all.
        test_samples: The same of the test images.
        seed: Seed of the orders.
        image_size: Resize images to so many pixels a side; None leaves their size. With `channels`, it brings data sets to
            one shape, which masks that move between them need.
        channels: 1 (the mean over channels) or 3 (repeated); None leaves them.
        labels: Only images of these classes, numbered anew in this order; None takes all.
        standardise: Whether to standardise; without, images are in [0, 1], as attacks need them (`NormalizedModel`).
    """

    downloadable: ClassVar[bool] = True

    def __init__(
        self,
        root: str = "data",
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
        super().__init__()
        name = type(self).__name__
        if download and not self.downloadable:
            raise PruneError(
                f"Expected {name} on disk; found download=true, which torchvision cannot do for it. "
                "Get it from its authors and set data.init_args.root to its folder."
            )
        self.root = root
        self.batch_size = batch_size
        self.workers = workers
        self.download = download
        self.train_samples = train_samples
        self.test_samples = test_samples
        self.seed = seed
        self.image_size = image_size
        self.channels = channels
        self.labels = labels
        self.standardise = standardise

    @abstractmethod
    def open(self, train: bool, transform: Any, download: bool) -> Any:
        """Open the training or the test images.

        Args:
            train: Whether it is the training images.
            transform: What to do to each image.
            download: Whether to download what is missing.

        Returns:
            A data set of (image, label).
        """

    @abstractmethod
    def transforms(self, augment: bool) -> list[Any]:
        """Say what is done to an image.

        Args:
            augment: Whether to draw a random variant of it, for training.

        Returns:
            Transforms of torchvision.transforms.v2, from a PIL image to a float tensor.
        """

    def prepare_data(self) -> None:
        """Download, where asked to."""
        if self.download:
            for train in (True, False):
                self.open(train, None, download=True)

    def setup(self, stage: str) -> None:
        """Open the data.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            PruneError: If the data are not there, or torchvision is not.
        """
        try:
            self.train_set = self._part(True, self._transform(augment=True))
            self.plain_train_set = self._part(True, self._transform(augment=False))
            self.test_set = self._part(False, self._transform(augment=False))
        except ImportError as error:
            raise PruneError(
                f"Expected torchvision and what it reads {type(self).__name__} with; found {error.name!r} missing. "
                "Run `pip install 'pl_prune[examples]'`."
            ) from error
        except (RuntimeError, OSError) as error:
            other = ", or data.init_args.download=true" if self.downloadable else ""
            raise PruneError(
                f"Expected {type(self).__name__}'s images under {self.root!r}; found none ({error}). "
                f"Set data.init_args.root to their folder{other}."
            ) from error

    def _transform(self, augment: bool) -> Any:
        from torchvision.transforms.v2 import Compose, Normalize

        steps = [t for t in self.transforms(augment) if self.standardise or not isinstance(t, Normalize)]
        return Compose([*steps, *to_shape(self.image_size, self.channels)])

    def _part(self, train: bool, transform: Any) -> Any:
        data = self.open(train, transform, download=False)
        if self.labels is not None:
            data = OfClasses(data, self.labels)
        count = self.train_samples if train else self.test_samples
        if count is None:
            return data
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.seed))
        return Subset(data, order[:count].tolist())

    def _loader(self, data: Any, **settings: Any) -> DataLoader:
        return DataLoader(data, batch_size=self.batch_size, num_workers=self.workers, **settings)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled, augmented training batches.

        Returns:
            A loader of (images, labels).
        """
        return self._loader(self.train_set, sampler=EpochShuffle(self.train_set, self.seed), drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return the test images.

        Returns:
            A loader of (images, labels).
        """
        return self._loader(self.test_set)

    test_dataloader = predict_dataloader = val_dataloader

    def scoring_dataloader(self) -> DataLoader:
        """Return the training images without augmentation, for scoring.

        Returns:
            A loader of (images, labels).
        """
        return self._loader(self.plain_train_set)
