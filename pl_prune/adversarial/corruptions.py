"""Accuracy on corrupted images: CIFAR-10-C and its like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.adversarial.chunk import unseen
from pl_prune.adversarial.inputs import check_inputs, logits_of
from pl_prune.core.types import PruneError, check_choice, check_count

CORRUPTIONS = (
    *(
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "snow",
    ),
    *("frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen of the benchmark; the archive's other four are for tuning."""
_SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class CorruptionAccuracy:
    """Accuracy under each corruption.

    Args:
        severity: 1 to 5.
        by_name: Accuracy of each corruption.
    """

    severity: int
    by_name: dict[str, float]

    @property
    def mean(self) -> float:
        """Over the corruptions."""
        return sum(self.by_name.values()) / len(self.by_name)

    def text(self) -> str:
        """Return the accuracies as a few lines.

        Returns:
            One for each corruption and one for their mean.
        """
        rows = [*self.by_name.items(), (f"mean, severity {self.severity}", self.mean)]
        return "\n".join(f"{name:<18} {100 * value:6.2f} %" for name, value in rows)


def corruption_accuracy(
    model: nn.Module,
    folder: str | Path,
    severity: int = 3,
    corruptions: Sequence[str] = CORRUPTIONS,
    images: int | None = None,
    batch_size: int = 250,
) -> CorruptionAccuracy:
    """Measure accuracy on corrupted test images.

    Args:
        model: Maps images in [0, 1] to logits.
        folder: Holds labels.npy and one .npy for each corruption: uint8 images (5 n, H, W, C), severity after severity.
        severity: 1 to 5; 3 in the papers on adversarial pruning.
        corruptions: Names of files, without ending.
        images: Use only the first so many of each; None takes all.
        batch_size: Images per forward pass.

    Returns:
        Accuracy of each corruption and their mean.

    Source:
        Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and perturbations; accuracy, not
        their error relative to AlexNet's.
    """
    check_choice("severity", severity, _SEVERITIES)
    check_count("batch_size", batch_size)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: dict[str, float] = {}
    with unseen(model) as run, torch.no_grad():
        for name in corruptions:
            pixels, labels = _open(Path(folder), name, severity, images)
            right = 0
            for start in range(0, len(labels), batch_size):
                part = slice(start, start + batch_size)
                x = torch.from_numpy(pixels[part].copy()).permute(0, 3, 1, 2).float() / 255
                y = labels[part]
                highest = check_inputs(x, y)
                right += int((logits_of(run, x.to(device), highest).argmax(1).cpu() == y).sum())
            found[name] = right / len(labels)
    return CorruptionAccuracy(severity, found)


def _open(folder: Path, name: str, severity: int, images: int | None) -> tuple[Any, Tensor]:
    """Return the images (n, H, W, C) of one severity, not yet read, and their labels."""
    import numpy as np

    arrays = []
    for file in (folder / f"{name}.npy", folder / "labels.npy"):
        try:
            arrays.append(np.load(file, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise PruneError(
                f"Expected an array in {str(file)!r}; found none ({error}). Unpack CIFAR-10-C, and give the folder of its .npy files."
            ) from error
    pixels, labels = arrays
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(labels) or len(pixels) % len(_SEVERITIES):
        raise PruneError(
            f"Expected uint8 images (5 n, H, W, C) and as many labels; found {pixels.dtype} {pixels.shape} in {name}.npy and "
            f"{labels.shape} labels. Use the files of the archive as they are."
        )
    size = len(pixels) // len(_SEVERITIES)
    part = slice((severity - 1) * size, (severity - 1) * size + min(size, images or size))
    return pixels[part], torch.from_numpy(np.array(labels[part])).long()
