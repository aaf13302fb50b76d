from __future__ import annotations

import fake_data
import pytest
import torch
from refusal import expect_refusal

from pl_prune.core.samples import Samples
from pl_prune.data import CIFAR, MNIST, SVHN, Digits, ImageNet, TinyImageNet

SMALL = {"batch_size": 4, "workers": 0}
KINDS = {
    "digits": (lambda root: Digits(batch_size=4), (1, 8, 8), 10),
    "mnist": (lambda root: MNIST(root, **SMALL), (1, 28, 28), 10),
    "cifar10": (lambda root: CIFAR(root, **SMALL), (3, 32, 32), 10),
    "cifar100": (lambda root: CIFAR(root, 100, **SMALL), (3, 32, 32), 32),
    "svhn": (lambda root: SVHN(root, **SMALL), (3, 32, 32), 10),
    "tinyimagenet": (lambda root: TinyImageNet(root, **SMALL), (3, 64, 64), 4),
    "imagenet": (lambda root: ImageNet(root, size=56, **SMALL), (3, 56, 56), 4),
}


@pytest.fixture
def root(request, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    kind = request.param
    if kind.startswith("cifar"):
        fake_data.cifar(folder, monkeypatch, int(kind[5:]))
    elif kind != "digits":
        make = {"mnist": fake_data.mnist, "tinyimagenet": fake_data.tiny_imagenet, "imagenet": fake_data.imagenet}
        make[kind](folder) if kind in make else fake_data.svhn(folder, monkeypatch)
    return kind, str(folder)


@pytest.mark.parametrize("root", KINDS, indirect=True)
def test_every_loader_gives_images_and_labels(root):
    make, shape, classes = KINDS[root[0]]
    data = make(root[1])
    data.prepare_data()
    data.setup("fit")
    for name in ("train", "val", "test", "predict", "scoring"):
        x, y = next(iter(getattr(data, f"{name}_dataloader")()))
        assert x.shape[1:] == shape, name
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert 0 <= int(y.min()) <= int(y.max()) < classes


@pytest.mark.parametrize("root", KINDS, indirect=True)
def test_scoring_samples_are_balanced_and_without_augmentation(root):
    make, _, classes = KINDS[root[0]]
    data = make(root[1])
    data.setup("fit")
    drawn = [Samples(per_class=1, seed=3).batches(data.scoring_dataloader())[0] for _ in range(2)]
    assert sorted(drawn[0][1].tolist()) == list(range(classes))
    assert torch.equal(drawn[0][0], drawn[1][0])
    if root[0] != "digits":
        chosen = Samples(per_class=1, seed=3).indices(data.plain_train_set)
        assert torch.equal(drawn[0][0], torch.stack([data.plain_train_set[i][0] for i in chosen]))
        augmented = torch.stack([data.train_set[i][0] for i in chosen])
        assert torch.equal(drawn[0][0], augmented) == (root[0] == "mnist")


@pytest.mark.parametrize("root", ["tinyimagenet"], indirect=True)
def test_tinyimagenet_reads_the_annotations_of_the_validation_images(root):
    data = TinyImageNet(root[1], **SMALL)
    data.setup("fit")
    assert data.test_set.targets == [3, 2, 1, 0]


@pytest.mark.parametrize("root", ["cifar10"], indirect=True)
def test_a_part_of_the_data_is_always_the_same_part(root):
    one, two = (CIFAR(root[1], train_samples=20, test_samples=7, **SMALL) for _ in range(2))
    one.setup("fit")
    two.setup("test")
    assert len(one.test_set) == 7
    assert one.train_set.indices == one.plain_train_set.indices == two.train_set.indices
    assert len(one.train_set.indices) == 20


@pytest.mark.parametrize("kind", [CIFAR, SVHN, MNIST, TinyImageNet, ImageNet], ids=lambda k: k.__name__)
def test_missing_images_are_an_error_that_says_what_to_set(kind, tmp_path):
    expected = [kind.__name__, str(tmp_path), "data.init_args.root"]
    with expect_refusal(*(expected[1:] if kind in (TinyImageNet, ImageNet) else [*expected, "download=true"])):
        kind(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("kind", [TinyImageNet, ImageNet], ids=lambda k: k.__name__)
def test_what_torchvision_cannot_download_is_refused(kind):
    with expect_refusal(kind.__name__, "download=true", "data.init_args.root"):
        kind(download=True)


def test_folders_that_do_not_fit_together_are_errors(tmp_path):
    fake_data.imagenet(tmp_path / "imagenet")
    (tmp_path / "imagenet" / "val" / "n0003").rename(tmp_path / "imagenet" / "val" / "other")
    with expect_refusal("same classes", "n0003", "folders of their classes"):
        ImageNet(str(tmp_path / "imagenet"), **SMALL).setup("fit")
    fake_data.tiny_imagenet(tmp_path / "tiny")
    (tmp_path / "tiny" / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn9999\t0\t0\t1\t1\n")
    with expect_refusal("n9999", "val_0.JPEG", "Unpack"):
        TinyImageNet(str(tmp_path / "tiny"), **SMALL).setup("fit")
    with expect_refusal("10 or 100 classes", "found 20", "Choose"):
        CIFAR(classes=20)
