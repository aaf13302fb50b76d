"""Scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from pl_prune.core.types import PruneError
from pl_prune.data.shape import to_shape
from pl_prune.data.shuffle import EpochShuffle


class Digits(LightningDataModule):
    """1797 images of 8x8 pixels in 10 classes, as tensors (1, 8, 8) in [0, 1].

    Split by a fixed shuffle into 1257 for training, 180 for validation and 360 for testing.

    Args:
        batch_size: Samples per batch.
        seed: Seed of the split and of the order of training batches.
        image_size: Resize images to so many pixels a side; None leaves their size.
        channels: 1, or 3 for the same image three times; None leaves the one.
    """

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.image_size = image_size
        self.channels = channels

    def setup(self, stage: str) -> None:
        """Load and split.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            PruneError: If scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise PruneError(
                "Expected scikit-learn for the digits; found it missing. Run `pip install 'pl_prune[examples]'`."
            ) from error
        digits = load_digits()
        x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        for step in to_shape(self.image_size, self.channels):
            x = step(x)
        y = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.seed))
        train, val, test = order[:1257], order[1257:1437], order[1437:]
        self.train_set, self.val_set, self.test_set = (TensorDataset(x[part], y[part]) for part in (train, val, test))

    def train_dataloader(self) -> DataLoader:
        """Return shuffled training batches.

        Returns:
            A loader of (images, labels).
        """
        return DataLoader(self.train_set, batch_size=self.batch_size, sampler=EpochShuffle(self.train_set, self.seed))

    def val_dataloader(self) -> DataLoader:
        """Return validation batches.

        Returns:
            A loader of (images, labels).
        """
        return DataLoader(self.val_set, batch_size=180)

    def test_dataloader(self) -> DataLoader:
        """Return test batches.

        Returns:
            A loader of (images, labels).
        """
        return DataLoader(self.test_set, batch_size=360)

    def predict_dataloader(self) -> DataLoader:
        """Return the test batches, for prediction.

        Returns:
            A loader of (images, labels).
        """
        return self.test_dataloader()

    def scoring_dataloader(self) -> DataLoader:
        """Return the training set without augmentation, for scoring.

        Returns:
            A loader of (images, labels).
        """
        return DataLoader(self.train_set, batch_size=self.batch_size)
