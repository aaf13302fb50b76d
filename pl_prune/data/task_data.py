"""What the data modules of segmentation, super-resolution and detection share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pl_prune.core.types import PruneError
from pl_prune.data.shuffle import EpochShuffle

Part = Literal["train", "scoring", "val", "test"]
"""Training samples with and without augmentation, validation samples, test samples."""

_OPENED: dict[str, tuple[Part, ...]] = {
    "fit": ("train", "scoring", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


class TaskData(LightningDataModule, ABC):
    """Samples read from folders, each part only when it is needed: a test needs no training images.

    A data set is a subclass that says how its parts are opened.

    Args:
        root: Folder of the data.
        batch_size: Training samples per batch.
        eval_batch_size: The same of validation and test samples.
        workers: Processes that load.
        seed: Seed of the order.
    """

    collate: ClassVar[Callable[[list[Any]], Any] | None] = None

    def __init__(
        self, root: str = "data", batch_size: int = 8, eval_batch_size: int = 1, workers: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.workers = workers
        self.seed = seed
        self.parts: dict[Part, Any] = {}

    @abstractmethod
    def open(self, part: Part) -> Any:
        """Open samples.

        Args:
            part: Which.

        Returns:
            A data set.
        """

    def setup(self, stage: str) -> None:
        """Open what a stage needs.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            PruneError: If the data are not there, or what reads them is not.
        """
        name = type(self).__name__
        try:
            self.parts.update({part: self.open(part) for part in _OPENED[stage] if part not in self.parts})
        except ImportError as error:
            raise PruneError(
                f"Expected torchvision and what it reads {name} with; found {error.name!r} missing. "
                "Run `pip install 'pl_prune[examples,detection]'`."
            ) from error
        except (RuntimeError, OSError) as error:
            raise PruneError(
                f"Expected {name}'s folders under {self.root!r}; found them missing or incomplete ({error}). "
                "Set data.init_args.root to the folder that docs/tasks.md describes."
            ) from error

    def _loader(self, part: Part, batch_size: int, **settings: Any) -> DataLoader[Any]:
        collate = type(self).collate
        return DataLoader(
            self.parts[part], batch_size=batch_size, num_workers=self.workers, collate_fn=collate, **settings
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled, augmented training batches.

        Returns:
            A loader.
        """
        order = EpochShuffle(self.parts["train"], self.seed)
        return self._loader("train", self.batch_size, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches.

        Returns:
            A loader.
        """
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches.

        Returns:
            A loader.
        """
        return self._loader("test", self.eval_batch_size)

    predict_dataloader = test_dataloader

    def scoring_dataloader(self) -> DataLoader[Any]:
        """Return training samples without augmentation, for scoring.

        Returns:
            A loader.
        """
        return self._loader("scoring", self.batch_size)
