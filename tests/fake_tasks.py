"""A few random images in the file layouts of segmentation, super-resolution and detection, and small networks for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import MultiScaleRoIAlign


def _image(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def cityscapes(root: Path, height: int = 24, width: int = 48) -> np.ndarray:
    """Every id from 0 to 33 is in every image of labels, in columns from the left; the licence plate's is 255 there."""
    ids = np.broadcast_to(np.arange(width, dtype=np.uint8) % 35, (height, width)).copy()
    ids[ids == 34] = 255
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            name = f"town_{i:06}_000019"
            _image(root / "leftImg8bit" / split / "town" / f"{name}_leftImg8bit.png", height, width, i)
            labels = root / "gtFine" / split / "town" / f"{name}_gtFine_labelIds.png"
            labels.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids).save(labels)
            for other in ("instanceIds.png", "color.png", "polygons.json"):
                labels.with_name(f"{name}_gtFine_{other}").touch()
    return ids


def _pair(large: Path, small: Path, name: str, height: int, width: int, scale: int = 2) -> None:
    """A small image that is every second pixel of the large one."""
    pixels = _image(large / f"{name}.png", height, width, sum(map(ord, name)))
    small.mkdir(parents=True, exist_ok=True)
    reduced = pixels[: height // scale * scale : scale, : width // scale * scale : scale]
    Image.fromarray(reduced).save(small / f"{name}x{scale}.png")


def div2k(root: Path) -> None:
    for kind, names in (("train", ("0001", "0002", "0003")), ("valid", ("0801", "0802"))):
        for name in names:
            _pair(root / f"DIV2K_{kind}_HR", root / f"DIV2K_{kind}_LR_bicubic" / "X2", name, 40, 32)
    for name, images in (("Set14", ("baboon", "zebra")), ("B100", ("101085",)), ("Urban100", ("img_001",))):
        for image in images:
            folder = root / "benchmark" / name
            _pair(folder / "HR", folder / "LR_bicubic" / "X2", image, 21, 30)
    grey = root / "benchmark" / "Set14" / "HR" / "zebra.png"
    Image.open(grey).convert("L").save(grey)


def coco(root: Path, size: int = 64) -> None:
    """Four training images, of which one has no box and one a crowd's alone; two to validate on."""
    boxes = {
        "train2017": [
            (1, [8, 8, 40, 40], 1, 0),
            (1, [0, 0, 10, 10], 3, 1),
            (2, [4, 20, 30, 80], 3, 0),
            (2, [5, 5, 0, 9], 1, 0),
            (4, [0, 0, 20, 20], 1, 1),
        ],
        "val2017": [(1, [8, 8, 40, 40], 1, 0), (1, [0, 0, 10, 10], 3, 1)],
    }
    for name, count in (("train2017", 4), ("val2017", 2)):
        images = [{"id": i + 1, "file_name": f"{i + 1:012}.jpg", "height": size, "width": size} for i in range(count)]
        for one in images:
            _image(root / name / one["file_name"], size, size, one["id"])
        annotations = [
            {
                "id": i + 1,
                "image_id": image,
                "bbox": box,
                "category_id": kind,
                "iscrowd": crowd,
                "area": box[2] * box[3],
            }
            for i, (image, box, kind, crowd) in enumerate(boxes[name])
        ]
        categories = [{"id": 1, "name": "one"}, {"id": 3, "name": "three"}]
        file = root / "annotations" / f"instances_{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


class Stem(nn.Module):
    """Two convolutions, the second at half the size; features by name as torchvision's backbones give them."""

    out_channels = 8

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = self.first(x)
        return dict(zip(self.names, (self.second(first), first), strict=False))


def small_deeplab() -> DeepLabV3:
    return DeepLabV3(Stem(("out", "aux")), DeepLabHead(8, 19, (2, 4)), FCNHead(8, 19))


def small_detector() -> FasterRCNN:
    return FasterRCNN(
        Stem(("0",)),
        num_classes=4,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 2, 2),
        rpn_pre_nms_top_n_train=20,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_train=10,
        rpn_post_nms_top_n_test=10,
    )
