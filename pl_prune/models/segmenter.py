"""`SemanticSegmenter`: train a network that gives each pixel a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from pl_prune.core.types import PruneError
from pl_prune.models.example import example_images


class SemanticSegmenter(LightningModule):
    """Train any network of pixels' logits by cross-entropy, and log loss and mean intersection over union (IoU).

    The mean is over the classes that are in labels or predictions of the whole epoch, from one confusion matrix.

    Args:
        network: Maps images (N, C, H, W) to logits (N, num_classes, H, W), alone or under "out" as torchvision's networks do;
            logits under "aux" add to the loss.
        num_classes: Number of classes.
        ignore_index: Label of pixels that do not count.
        aux_weight: Factor of the loss of "aux".
        example_size: Side of the random images on which structured pruning traces the network: of the full size, it takes
            minutes and finds the same share of operations.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 19,
        ignore_index: int = 255,
        aux_weight: float = 0.4,
        example_size: int = 128,
    ) -> None:
        super().__init__()
        self.example_input_array = example_images(example_size)
        self.network = network
        self.aux_weight = aux_weight
        self.loss = nn.CrossEntropyLoss(ignore_index=ignore_index)
        self.val_miou, self.test_miou = (
            MulticlassJaccardIndex(num_classes, ignore_index=ignore_index) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Any:
        """Return what the network does: auxiliary logits are outputs too.

        Args:
            x: Images (N, C, H, W).

        Returns:
            Logits, or logits by name.
        """
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch.

        Args:
            batch: Images and labels (N, H, W).
            batch_idx: Its number in the epoch.

        Returns:
            Mean cross-entropy over pixels.
        """
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and mean IoU of validation.

        Args:
            batch: Images and labels.
            batch_idx: Its number.
        """
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and mean IoU of the test.

        Args:
            batch: Images and labels.
            batch_idx: Its number.
        """
        self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the predicted classes.

        Args:
            batch: Images and labels.
            batch_idx: Its number.

        Returns:
            Class indices (N, H, W).
        """
        return self._logits(batch[0])[0].argmax(1)

    def panels(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Return images to look at: input, target and prediction.

        Args:
            batch: Images and labels.

        Returns:
            The columns for `image_panels`: inputs stretched over [0, 1]; pixels that do not count are -1.
        """
        x, y = batch
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        target = y.masked_fill(y == self.loss.ignore_index, -1)
        prediction = self.predict_step(batch, 0)
        return {
            "columns": {"input": [*(x - low) / (high - low)], "target": [*target], "prediction": [*prediction]},
        }

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self(x)
        out, aux = (found.get("out"), found.get("aux")) if isinstance(found, Mapping) else (found, None)
        if not isinstance(out, Tensor) or out.ndim != 4 or out.shape[-2:] != x.shape[-2:]:
            names = f" with {sorted(found)}" if isinstance(found, Mapping) else ""
            shape = f" of shape {tuple(out.shape)}" if isinstance(out, Tensor) else ""
            raise PruneError(
                f"Expected {type(self.network).__name__} to return logits (N, classes, {x.shape[-2]}, {x.shape[-1]}), alone or as 'out'; "
                f"found {type(found).__name__}{names}{shape}. Wrap the network, and resize its logits to its inputs."
            )
        return out, aux

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        logits, aux = self._logits(x)
        loss = self.loss(logits, y)
        if aux is not None and stage == "train":
            loss = loss + self.aux_weight * self.loss(aux, y)
        self.log(f"{stage}/loss", loss, on_epoch=True, on_step=False, batch_size=len(x))
        if stage != "train":
            miou = getattr(self, f"{stage}_miou")
            miou(logits, y)
            self.log(f"{stage}/miou", miou, on_epoch=True, on_step=False, batch_size=len(x), prog_bar=True)
        return loss
