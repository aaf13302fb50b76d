"""`SuperResolution`: train a network that enlarges images, and measure its peak signal-to-noise ratio."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from pl_prune.core.types import PruneError
from pl_prune.models.example import example_images


class SuperResolution(LightningModule):
    """Train a network by the mean absolute error, and log the peak signal-to-noise ratio of brightness (dB).

    A batch is (small images, large images), in testing (small, large, names of their sets): the mean over the images of each
    set is logged by its name, as `test/psnr_Set14`. Test on one device: processes do not share these means.

    Args:
        network: Maps images (N, 3, H, W) in [0, 1] to larger ones.
        border: Pixels at each side that do not count in the ratio; the field takes the scale.
        example_size: Side of the random images on which structured pruning traces the network; smaller is faster.

    Raises:
        PruneError: If the border is negative, or there is no such size.
    """

    def __init__(self, network: nn.Module, border: int = 2, example_size: int = 16) -> None:
        super().__init__()
        if border < 0:
            raise PruneError(f"Expected a border of 0 pixels or more; found {border}. Take the scale, as others do.")
        self.example_input_array = example_images(example_size)
        self.network = network
        self.border = border
        self.loss = nn.L1Loss()
        self.val_psnr = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        """Return large images.

        Args:
            x: Images (N, 3, H, W) in [0, 1].

        Returns:
            Images, about in [0, 1].
        """
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch.

        Args:
            batch: Small and large patches.
            batch_idx: Its number in the epoch.

        Returns:
            Mean absolute error.
        """
        small, large = batch
        loss = self.loss(self(small), large)
        self.log("train/loss", loss, on_epoch=True, on_step=False, batch_size=len(small))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the ratio of validation images.

        Args:
            batch: Small and large images.
            batch_idx: Its number.
        """
        self.val_psnr(luma_psnr(self(batch[0]), batch[1], self.border))
        self.log("val/psnr", self.val_psnr, on_epoch=True, on_step=False, batch_size=len(batch[0]), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> None:
        """Log the ratio of test images, for each set.

        Args:
            batch: Small and large images, and the names of their sets.
            batch_idx: Its number.
        """
        small, large, names = batch
        for name, ratio in zip(names, luma_psnr(self(small), large, self.border), strict=True):
            self.log(f"test/psnr_{name}", ratio, on_epoch=True, on_step=False, batch_size=1)

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return large images.

        Args:
            batch: Small images, and what else there is.
            batch_idx: Its number.

        Returns:
            Images in [0, 1].
        """
        return self(batch[0]).clamp(0, 1)

    def panels(self, batch: tuple[Tensor, ...]) -> dict[str, Any]:
        """Return images to look at: input, target and prediction.

        Args:
            batch: Small and large images.

        Returns:
            The columns for `image_panels`.
        """
        prediction = self(batch[0]).clamp(0, 1)
        return {"columns": {"input": [*batch[0]], "target": [*batch[1]], "prediction": [*prediction]}}


def luma_psnr(output: Tensor, target: Tensor, border: int = 0) -> Tensor:
    """Return the peak signal-to-noise ratio of brightness, as published for super-resolution.

    Images are rounded to 256 levels; brightness is Y of ITU-R BT.601 in [16, 235], not rounded, and the peak is 255.

    Args:
        output: Images (N, 3, H, W) about in [0, 1].
        target: The same shape.
        border: Pixels at each side that do not count.

    Returns:
        Decibels (N,); infinite for equal images.

    Raises:
        PruneError: If shapes differ, are not images, or the border leaves no pixel.
    """
    if output.shape != target.shape or output.ndim != 4 or output.shape[1] != 3:
        raise PruneError(
            f"Expected two batches of images (N, 3, H, W) of one shape; found {tuple(output.shape)} and {tuple(target.shape)}. "
            "Check that the network's scale is that of the data."
        )
    if min(output.shape[-2:]) <= 2 * border:
        raise PruneError(
            f"Expected images larger than twice the border; found {tuple(output.shape[-2:])} and {border}. Lower it."
        )
    error = _luma(output) - _luma(target)
    height, width = error.shape[-2:]
    inside = error[:, border : height - border, border : width - border]
    return 10 * torch.log10(255**2 / inside.square().mean((1, 2)))


def _luma(x: Tensor) -> Tensor:
    weights = torch.tensor([65.481, 128.553, 24.966], device=x.device) / 255
    levels = (x.detach().float() * 255).round().clamp(0, 255)
    return 16 + (levels * weights.view(3, 1, 1)).sum(1)
