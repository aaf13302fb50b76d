"""A few random images in the file layouts of the data modules."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    for name in files:
        labels = [i % classes for i in range(32)]
        (folder / name).write_bytes(
            pickle.dumps({"data": images(32, 3072), "labels" if classes == 10 else "fine_labels": labels})
        )
    meta, key = ("batches.meta", "label_names") if classes == 10 else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({key: [str(i) for i in range(classes)]}))


def mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, n in (("train", 40), ("t10k", 20)):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, n, 28, 28) + images(n, 28, 28).tobytes()
        )
        labels = np.arange(n, dtype=np.uint8) % 10
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels.tobytes())


def svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda self: True)
    root.mkdir(parents=True)
    for name in ("train", "test"):
        savemat(root / f"{name}_32x32.mat", {"X": images(32, 32, 3, 30), "y": np.arange(30)[:, None] % 10 + 1})


def _save(path: Path, side: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images(side, side, 3)).save(path)


def tiny_imagenet(root: Path, classes: int = 4) -> None:
    rows = []
    for c in range(classes):
        for i in range(4):
            _save(root / "train" / f"n{c:04}" / "images" / f"n{c:04}_{i}.JPEG", 64)
        _save(root / "val" / "images" / f"val_{c}.JPEG", 64)
        rows.append(f"val_{c}.JPEG\tn{c:04}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(rows)))


def imagenet(root: Path, classes: int = 4) -> None:
    for part, count in (("train", 4), ("val", 1)):
        for c in range(classes):
            for i in range(count):
                _save(root / part / f"n{c:04}" / f"{i}.JPEG", 300 - 40 * i)
