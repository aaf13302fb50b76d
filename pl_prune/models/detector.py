"""`Detector`: train one of torchvision's detection networks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pl_prune.core.types import PruneError
from pl_prune.models.example import example_images


class Detector(LightningModule):
    """Train a detection network by the sum of its losses, and log mean average precision (mAP) as COCO defines it.

    A batch is (images, targets): lists with an image (3, H, W) in [0, 1] and a dict of boxes (K, 4) (x0, y0, x1, y1 in pixels),
    labels (K,) and, in evaluation, iscrowd and area for each sample.

    Scoring for pruning runs in training mode, where these networks compute losses, with batch norms as in evaluation.

    Args:
        network: A network of torchvision.models.detection: images and targets give losses in training mode, images alone
            boxes, labels and scores in evaluation.
        example_size: Side of the random images on which structured pruning traces the network; smaller is faster.

    Raises:
        PruneError: If pycocotools is missing, or there is no such size.
    """

    def __init__(self, network: nn.Module, example_size: int = 64) -> None:
        super().__init__()
        from torchmetrics.detection import MeanAveragePrecision

        self.network = network
        self.example_input_array = example_images(example_size)[:1]
        try:
            self.val_map, self.test_map = (MeanAveragePrecision() for _ in range(2))
        except ImportError as error:
            raise PruneError(
                f"Expected pycocotools, which counts mean average precision; found none ({error}). Run `pip install 'pl_prune[detection]'`."
            ) from error
        for metric in (self.val_map, self.test_map):
            metric.warn_on_many_detections = False  # COCO's own count takes the best 100 too

    def forward(self, images: Any) -> Any:
        """Return detections.

        Args:
            images: A list of images (3, H, W), or a tensor (N, 3, H, W).

        Returns:
            In evaluation, a dict of boxes, labels and scores for each image.
        """
        return self.network(images)

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor:
        """Return the loss of a training batch.

        Args:
            batch: Images and targets.
            batch_idx: Its number in the epoch.

        Returns:
            The sum of the network's losses.
        """
        losses = self.network(*batch)
        loss = torch.stack(list(losses.values())).sum()
        for name, value in [*losses.items(), ("loss", loss)]:
            self.log(f"train/{name}", value, on_epoch=True, on_step=False, batch_size=len(batch[0]))
        return loss

    def scoring_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor:
        """Return the loss by which pruning scores the network.

        Args:
            batch: Images and targets.
            batch_idx: Its number.

        Returns:
            The sum of the network's losses.
        """
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self.training_step(batch, batch_idx)

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> None:
        """Count the detections of a validation batch.

        Args:
            batch: Images and targets.
            batch_idx: Its number.
        """
        self.val_map.update(self(batch[0]), list(batch[1]))

    def test_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> None:
        """Count the detections of a test batch.

        Args:
            batch: Images and targets.
            batch_idx: Its number.
        """
        self.test_map.update(self(batch[0]), list(batch[1]))

    def predict_step(self, batch: tuple[list[Tensor], Any], batch_idx: int) -> Any:
        """Return detections.

        Args:
            batch: Images and targets.
            batch_idx: Its number.

        Returns:
            A dict of boxes, labels and scores for each image.
        """
        return self(batch[0])

    def panels(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> dict[str, Any]:
        """Return images with boxes to look at: targets, and predictions with a score of 0.5 or more.

        Args:
            batch: Images and targets.

        Returns:
            The columns and boxes for `image_panels`.
        """
        images, targets = batch
        found = [one["boxes"][one["scores"] >= 0.5] for one in self(images)]
        return {
            "columns": {"target": images, "prediction": images},
            "boxes": {"target": [target["boxes"] for target in targets], "prediction": found},
        }

    def on_validation_epoch_end(self) -> None:
        """Log the precision over all validation images."""
        self._log_map(self.val_map, "val")

    def on_test_epoch_end(self) -> None:
        """Log the precision over all test images."""
        self._log_map(self.test_map, "test")

    def _log_map(self, metric: Any, stage: str) -> None:
        found = metric.compute()
        metric.reset()
        self.log(f"{stage}/map", found["map"], prog_bar=True)
        self.log(f"{stage}/map_50", found["map_50"])
