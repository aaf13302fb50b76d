from __future__ import annotations

import fake_data
import pytest
import torch
from refusal import expect_refusal

from pl_prune.core.samples import Samples
from pl_prune.data import CIFAR, MNIST, SVHN, Digits, ImageNet, TinyImageNet
from pl_prune.data.shuffle import EpochShuffle

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


@pytest.mark.parametrize("root", ["mnist", "cifar10", "svhn"], indirect=True)
def test_data_sets_are_brought_to_one_shape_and_to_some_classes(root):
    kind = {"mnist": MNIST, "cifar10": CIFAR, "svhn": SVHN}[root[0]]
    whole, part = (kind(root[1], image_size=16, channels=3, labels=labels, **SMALL) for labels in (None, [7, 2]))
    whole.setup("fit")
    part.setup("fit")
    x = part.plain_train_set[0][0]
    assert x.shape == (3, 16, 16)
    old = [(image, label) for image, label in whole.plain_train_set if label in (7, 2)]
    assert len(part.plain_train_set) == len(old) > 1
    for (image, label), (same, was) in zip(part.plain_train_set, old, strict=True):
        assert torch.equal(image, same)
        assert label == {7: 0, 2: 1}[int(was)]
    drawn = Samples(per_class=1, seed=3).batches(part.scoring_dataloader())[0]
    assert sorted(drawn[1].tolist()) == [0, 1]


def test_digits_are_resized_and_made_grey_or_coloured():
    data = Digits(image_size=4, channels=3)
    data.setup("fit")
    x = data.train_set.tensors[0]
    assert x.shape[1:] == (3, 4, 4)
    assert torch.equal(x[:, 0], x[:, 2])


@pytest.mark.parametrize("root", ["mnist"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": [3, 3]}, ["each once", "[3, 3]"]),
        ({"labels": [12]}, ["classes of the data", "[12]"]),
        ({"labels": []}, ["classes of the data", "[]"]),
        ({"image_size": 0}, ["image_size", "0"]),
        ({"channels": 2}, ["1 or 3 channels", "2"]),
    ],
)
def test_shapes_and_classes_that_cannot_be_are_refused(root, settings, words):
    data = MNIST(root[1], **{**SMALL, **settings})
    with expect_refusal(*words):
        data.setup("fit")


def test_the_order_of_batches_follows_the_run_and_the_epoch(monkeypatch):
    def order(run, epoch):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(run))
        sampler = EpochShuffle(range(50))
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = {(run, epoch): order(run, epoch) for run in (0, 1, 42) for epoch in (0, 1)}
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(one) == list(range(50)) for one in orders.values())
    assert order(42, 1) == orders[42, 1]
