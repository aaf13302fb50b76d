"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pl_prune.core.types import PruneError
from pl_prune.data.shuffle import EpochShuffle

_MEAN = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4865, 0.4409)}
_STD = {10: (0.2470, 0.2435, 0.2616), 100: (0.2673, 0.2564, 0.2762)}


class CIFAR(LightningDataModule):
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
    ) -> None:
        super().__init__()
        if classes not in _MEAN:
            raise PruneError(f"Expected 10 or 100 classes; found {classes}. Choose one of them.")
        self.root = root
        self.classes = classes
        self.batch_size = batch_size
        self.workers = workers
        self.download = download
        self.train_samples = train_samples
        self.test_samples = test_samples
        self.seed = seed

    def prepare_data(self) -> None:
        """Download, where asked to."""
        if self.download:
            self._read(train=True, augment=False, download=True)

    def setup(self, stage: str) -> None:
        """Open the data.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            PruneError: If the data are not there.
        """
        try:
            self.train_set = self._read(train=True, augment=True)
            self.plain_train_set = self._read(train=True, augment=False)
            self.test_set = self._read(train=False, augment=False)
        except RuntimeError as error:
            raise PruneError(
                f"Expected CIFAR-{self.classes} under {self.root!r}; found none ({error}). "
                "Set data.init_args.root to its folder, or data.init_args.download=true."
            ) from error

    def _read(self, train: bool, augment: bool, download: bool = False) -> Any:
        import torch
        from torch.utils.data import Subset
        from torchvision import datasets
        from torchvision.transforms import v2

        steps = [v2.ToImage()]
        if augment:
            steps += [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN[self.classes], _STD[self.classes])]
        kind = datasets.CIFAR10 if self.classes == 10 else datasets.CIFAR100
        data = kind(self.root, train=train, transform=v2.Compose(steps), download=download)
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

    def test_dataloader(self) -> DataLoader:
        """Return the test images.

        Returns:
            A loader of (images, labels).
        """
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        """Return the test images.

        Returns:
            A loader of (images, labels).
        """
        return self._loader(self.test_set)

    def scoring_dataloader(self) -> DataLoader:
        """Return the training images without augmentation, for scoring.

        Returns:
            A loader of (images, labels).
        """
        return self._loader(self.plain_train_set)
