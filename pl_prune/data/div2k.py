"""DIV2K and the test sets of super-resolution, read from folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from pl_prune.core.types import PruneError, check_count
from pl_prune.data.task_data import Part, TaskData


class DIV2K(TaskData):
    """800 training and 100 validation photographs with their bicubic reductions, and sets of photographs to test on.

    `root` holds DIV2K_train_HR, DIV2K_train_LR_bicubic/X2, DIV2K_valid_HR, DIV2K_valid_LR_bicubic/X2, and for each test set
    benchmark/SET/HR and benchmark/SET/LR_bicubic/X2: the image NAME of HR is NAMEx2 in X2. Training takes random patches,
    flipped and turned; scoring sees the centre of each photograph, evaluation all of it.

    Args:
        root: The folder that holds all of these.
        scale: How many times as many pixels a side the large images have.
        patch: Side of the small patches in pixels.
        patches_per_image: Patches of each photograph in an epoch.
        benchmarks: Names of the test sets.
        val_samples: Take only the first so many validation images; None takes all.
        in_memory: Keep decoded photographs in memory (about 9 GB for scale 2) rather than decode one for each patch.
        batch_size: Patches per batch.
        workers: Processes that load.
        seed: Seed of the order.

    Raises:
        PruneError: If a size or count is not a whole number of 1 or more.
    """

    def __init__(
        self,
        root: str = "data/div2k",
        scale: int = 2,
        patch: int = 64,
        patches_per_image: int = 80,
        benchmarks: list[str] | None = None,
        val_samples: int | None = None,
        in_memory: bool = False,
        batch_size: int = 64,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, 1, workers, seed)
        check_count("scale", scale)
        check_count("patch", patch)
        check_count("patches_per_image", patches_per_image)
        if val_samples is not None:
            check_count("val_samples", val_samples)
        self.scale = scale
        self.patch = patch
        self.patches_per_image = patches_per_image
        self.benchmarks = ["Set14", "B100", "Urban100"] if benchmarks is None else benchmarks
        self.val_samples = val_samples
        self.in_memory = in_memory

    def open(self, part: Part) -> Any:
        """Open pairs of images.

        Args:
            part: Which.

        Returns:
            A data set of (small image, large image), in testing with the name of the set.
        """
        root, reduced = Path(self.root), f"LR_bicubic/X{self.scale}"
        if part == "test":
            sets = [root / "benchmark" / name for name in self.benchmarks]
            return ConcatDataset([Pairs(s / "HR", s / reduced, self.scale, name=s.name) for s in sets])
        kind = "valid" if part == "val" else "train"
        large, small = root / f"DIV2K_{kind}_HR", root / f"DIV2K_{kind}_{reduced}"
        if part == "val":
            return Pairs(large, small, self.scale, first=self.val_samples)
        if part == "scoring":
            return Pairs(large, small, self.scale, self.patch)
        return Pairs(large, small, self.scale, self.patch, self.patches_per_image, self.in_memory)


class Pairs(Dataset[Any]):
    """Small and large versions of the same images, whole, or patches of them.

    Args:
        large: Folder of the large images.
        small: Folder of the small ones.
        scale: How many times as many pixels a side the large images have.
        patch: Side of the small patches; None gives whole images.
        random_patches: Random patches of each image, flipped and turned; 0 gives the patch at its centre.
        in_memory: Whether to read every image now.
        first: Only the first so many images.
        name: Given with each pair.

    Raises:
        PruneError: If there is no image, one has no partner, or sizes do not fit.
    """

    def __init__(
        self,
        large: Path,
        small: Path,
        scale: int,
        patch: int | None = None,
        random_patches: int = 0,
        in_memory: bool = False,
        first: int | None = None,
        name: str | None = None,
    ) -> None:
        found = sorted(p for p in large.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp"))
        if not found:
            raise PruneError(f"Expected images in {str(large)!r}; found none. Unpack the large images there.")
        self.files = [(small / f"{p.stem}x{scale}{p.suffix}", p) for p in found[:first]]
        missing = [str(s) for s, _ in self.files if not s.is_file()]
        if missing:
            raise PruneError(
                f"Expected a small image for each of {len(self.files)} large ones of {str(large)!r}; found {len(missing)} missing, "
                f"{missing[0]!r} first. Unpack the bicubic reductions by {scale} there."
            )
        self.scale = scale
        self.patch = patch
        self.random_patches = random_patches
        self.name = name
        self.kept = [self._read(i) for i in range(len(self.files))] if in_memory else None

    def __len__(self) -> int:
        return len(self.files) * max(1, self.random_patches)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        index %= len(self.files)
        small, large = self._read(index) if self.kept is None else self.kept[index]
        if self.patch is not None:
            small, large = self._cut(small, large)
        pair = (small.float() / 255, large.float() / 255)
        return pair if self.name is None else (*pair, self.name)

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return both images; the large one without the rest that no small pixel stands for."""
        small, large = (_pixels(file) for file in self.files[index])
        height, width = (self.scale * side for side in small.shape[1:])
        if not all(0 <= rest < self.scale for rest in (large.shape[1] - height, large.shape[2] - width)):
            raise PruneError(
                f"Expected {str(self.files[index][1])!r} to be {self.scale} times as large as its small image; found "
                f"{tuple(large.shape[1:])} and {tuple(small.shape[1:])}. Make the small image anew."
            )
        return small, large[:, :height, :width]

    def _cut(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        assert self.patch is not None
        side, scale = self.patch, self.scale
        room = [n - side for n in small.shape[1:]]
        if min(room) < 0:
            raise PruneError(
                f"Expected small images of {side} pixels or more a side; found {tuple(small.shape[1:])}. Lower data.init_args.patch."
            )
        if not self.random_patches:
            top, left = (n // 2 for n in room)
            turns, flip = 0, False
        else:
            top, left = (int(torch.randint(n + 1, ())) for n in room)
            turns, flip = int(torch.randint(4, ())), bool(torch.rand(()) < 0.5)
        pair = (
            small[:, top : top + side, left : left + side],
            large[:, scale * top : scale * (top + side), scale * left : scale * (left + side)],
        )
        turned = [image.rot90(turns, (1, 2)) for image in pair]
        first, second = (image.flip(2) if flip else image for image in turned)
        return first, second


def _pixels(file: Path) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    with Image.open(file) as image:
        return pil_to_tensor(image.convert("RGB"))
