"""The LightningModule of the recipes."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class ImageClassifier(LightningModule):
    """Train any network of logits by cross-entropy, and log loss and top-1 accuracy, and top-5 where classes are many.

    It knows nothing of pruning. The optimizer comes from the command line or the recipe; without one, SGD with
    momentum.

    Args:
        network: Maps images (N, C, H, W) to logits (N, num_classes).
        num_classes: Number of classes; from 20 on, top-5 accuracy of validation and test is logged too, as `acc5`.
    """

    def __init__(self, network: nn.Module, num_classes: int = 10) -> None:
        super().__init__()
        self.network = network
        self.loss = nn.CrossEntropyLoss()
        self.train_acc, self.val_acc, self.test_acc = (
            MulticlassAccuracy(num_classes, average="micro") for _ in range(3)
        )
        self.val_acc5, self.test_acc5 = (
            MulticlassAccuracy(num_classes, average="micro", top_k=5) if num_classes >= 20 else None for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.

        Args:
            x: Images (N, C, H, W).

        Returns:
            Logits (N, num_classes).
        """
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch.

        Args:
            batch: Images and labels.
            batch_idx: Its number in the epoch.

        Returns:
            Mean cross-entropy.
        """
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and accuracy of a validation batch.

        Args:
            batch: Images and labels.
            batch_idx: Its number in the epoch.
        """
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and accuracy of a test batch.

        Args:
            batch: Images and labels.
            batch_idx: Its number in the epoch.
        """
        self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the predicted classes.

        Args:
            batch: Images and labels.
            batch_idx: Its number in the epoch.

        Returns:
            Class indices (N,).
        """
        return self(batch[0]).argmax(1)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = self.loss(logits, y)
        accuracy = getattr(self, f"{stage}_acc")
        accuracy(logits, y)
        self.log(f"{stage}/loss", loss, on_epoch=True, on_step=False, batch_size=len(x))
        top5 = getattr(self, f"{stage}_acc5", None)
        if top5 is not None:
            top5(logits, y)
            self.log(f"{stage}/acc5", top5, on_epoch=True, on_step=False, batch_size=len(x))
        self.log(f"{stage}/acc", accuracy, on_epoch=True, on_step=False, batch_size=len(x), prog_bar=True)
        return loss
