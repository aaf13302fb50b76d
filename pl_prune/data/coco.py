"""COCO and data sets in its format, for detection."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from pl_prune.data.task_data import Part, TaskData


def _listed(samples: list[Any]) -> tuple[list[Any], list[Any]]:
    return [image for image, _ in samples], [target for _, target in samples]


class COCO(TaskData):
    """Images with boxes in COCO's format; the validation images serve as test images.

    `root` holds a folder of images for each part, by default train2017 and val2017, and annotations/instances_PART.json.
    A sample is (image, target): (3, H, W) in [0, 1], and a dict of boxes (K, 4) as x0, y0, x1, y1 in pixels, labels
    (K,), which are the file's category ids, area and iscrowd. Training images are flipped at random; those without a box are
    left out, and so are boxes around crowds.

    Args:
        root: The folder that holds annotations and images.
        train: The training part's name.
        val: The validation part's name.
        batch_size: Images per batch.
        eval_batch_size: The same in evaluation.
        workers: Processes that load.
        seed: Seed of the order.
    """

    collate = staticmethod(_listed)

    def __init__(
        self,
        root: str = "data/coco",
        train: str = "train2017",
        val: str = "val2017",
        batch_size: int = 8,
        eval_batch_size: int = 8,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, eval_batch_size, workers, seed)
        self.train = train
        self.val = val

    def open(self, part: Part) -> Any:
        """Open the images and their boxes.

        Args:
            part: Which.

        Returns:
            A data set of (image, target).
        """
        from torchvision import datasets
        from torchvision.transforms import v2

        train = part in ("train", "scoring")
        name = self.train if train else self.val
        file = Path(self.root) / "annotations" / f"instances_{name}.json"
        steps = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        if part == "train":
            steps.insert(0, v2.RandomHorizontalFlip())
        with redirect_stdout(StringIO()):  # pycocotools prints
            data = datasets.CocoDetection(
                str(Path(self.root) / name), str(file), transforms=v2.Compose([_Boxes(crowds=not train), *steps])
            )
        if train:
            annotated = {one["image_id"] for one in data.coco.anns.values() if not one.get("iscrowd", 0)}
            data.ids = [index for index in data.ids if index in annotated]
        return data


class _Boxes:
    """Turn a PIL image and its annotations into tensors."""

    def __init__(self, crowds: bool) -> None:
        self.crowds = crowds

    def __call__(self, image: Any, annotations: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        from torchvision.transforms.v2 import functional
        from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

        pixels = functional.to_image(image)
        kept = [one for one in annotations if self.crowds or not one.get("iscrowd", 0)]
        corners = torch.tensor([one["bbox"] for one in kept], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        height, width = pixels.shape[-2:]
        corners = corners.clamp(min=0).minimum(corners.new_tensor([width, height, width, height]))
        solid = (corners[:, 2:] > corners[:, :2]).all(1)
        target: dict[str, Any] = {
            key: torch.tensor([one.get(name, 0) for one in kept], dtype=kind)[solid]
            for key, name, kind in (
                ("labels", "category_id", torch.int64),
                ("area", "area", torch.float32),
                ("iscrowd", "iscrowd", torch.int64),
            )
        }
        target["boxes"] = BoundingBoxes(corners[solid], format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
        return pixels, target
