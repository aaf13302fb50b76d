from __future__ import annotations

import shutil
from itertools import pairwise

import fake_tasks
import pytest
import torch
from PIL import Image
from refusal import expect_refusal

from pl_prune.core.samples import Samples
from pl_prune.data import COCO, DIV2K, Cityscapes

SMALL = {"batch_size": 2, "workers": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    for name in ("cityscapes", "div2k", "coco"):
        getattr(fake_tasks, name)(root / name)
    return root


def opened(kind, root, *stages, **settings):
    data = kind(str(root / kind.__name__.lower()), **{**SMALL, **settings})
    for stage in stages or ("fit", "test"):
        data.setup(stage)
    return data


def test_cityscapes_ids_become_the_19_classes(folders):
    ids = torch.from_numpy(fake_tasks.cityscapes(folders / "cityscapes")).long()
    classes = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, **{id_: id_ - 13 for id_ in range(19, 29)}}
    classes |= {31: 16, 32: 17, 33: 18}  # Cordts et al.'s table
    expected = torch.tensor([[classes.get(int(i), 255) for i in row] for row in ids])
    data = opened(Cityscapes, folders)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batches = list(loader)
        assert len(batches) == 2
        for x, y in batches:
            assert x.shape == (1, 3, 24, 48)
            assert x.dtype == torch.float32
            assert torch.equal(y[0], expected)
    assert len(set(expected.unique().tolist())) == 20


def test_cityscapes_crops_at_random_to_train_and_at_the_centre_to_score(folders):
    data = opened(Cityscapes, folders, "fit", crop_height=16, crop_width=24)
    batches = list(data.train_dataloader())
    assert [(x.shape, y.shape, y.dtype) for x, y in batches] == [((2, 3, 16, 24), (2, 16, 24), torch.int64)] * 2
    assert set(torch.cat([y.flatten() for _, y in batches]).tolist()) <= {*range(19), 255}
    whole = next(iter(data.val_dataloader()))[1][0]
    drawn = [Samples(total=3, batch_size=3).batches(data.scoring_dataloader())[0] for _ in range(2)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    for labels in drawn[0][1]:
        assert torch.equal(labels, whole[4:20, 12:36])


def test_a_crop_larger_than_the_image_is_filled_with_pixels_that_do_not_count(folders):
    data = opened(Cityscapes, folders, "fit", crop_height=100, crop_width=100, min_scale=1.0, max_scale=1.0)
    y = next(iter(data.train_dataloader()))[1][0]
    assert y.shape == (100, 100)
    assert int((y != 255).sum()) == int((next(iter(data.val_dataloader()))[1] != 255).sum())


def test_patches_are_cut_at_the_same_place_of_both_images(folders):
    data = opened(DIV2K, folders, "fit", patch=9, patches_per_image=20)
    train = data.parts["train"]
    assert len(train) == 60
    small, large = next(iter(data.train_dataloader()))
    assert (small.shape, large.shape) == ((2, 3, 9, 9), (2, 3, 18, 18))
    # the small image is every second pixel: at one corner of each block of four, by how the patch was turned
    blocks = large.unfold(2, 2, 2).unfold(3, 2, 2)
    for i in range(2):
        assert any(torch.equal(small[i], blocks[i, ..., a, b]) for a in (0, 1) for b in (0, 1))
    patches = [train[i][0] for i in range(0, 60, 3)]
    assert any(not torch.equal(a, b) for a, b in pairwise(patches))


def test_scoring_sees_the_centre_of_each_photograph(folders):
    data = opened(DIV2K, folders, "fit", patch=8)
    small, large = next(iter(data.scoring_dataloader()))
    pixels = torch.tensor(list(Image.open(folders / "div2k/DIV2K_train_HR/0001.png").tobytes())).view(40, 32, 3)
    whole = pixels.permute(2, 0, 1) / 255
    assert torch.equal(large[0], whole[:, 12:28, 8:24])
    assert torch.equal(small[0], whole[:, 12:28:2, 8:24:2])


def test_test_images_are_whole_and_carry_the_name_of_their_set(folders):
    data = opened(DIV2K, folders, "test")
    batches = list(data.test_dataloader())
    assert [[*names] for *_, names in batches] == [["Set14"], ["Set14"], ["B100"], ["Urban100"]]
    for small, large, _ in batches:
        assert (small.shape, large.shape) == ((1, 3, 10, 15), (1, 3, 20, 30))  # of 21x30
    grey = batches[1][1]
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert len(opened(DIV2K, folders, "validate", val_samples=1).val_dataloader()) == 1


def test_photographs_kept_in_memory_are_the_same(folders):
    kept, read = (opened(DIV2K, folders, "fit", patch=8, in_memory=m).parts["train"] for m in (True, False))
    for index in (0, 5):
        torch.manual_seed(index)
        one = kept[index]
        torch.manual_seed(index)
        assert all(torch.equal(a, b) for a, b in zip(one, read[index], strict=True))


def test_coco_boxes_become_corners_without_crowds_and_empty_ones(folders):
    data = opened(COCO, folders, batch_size=2)
    ((images, targets),) = data.scoring_dataloader()
    assert [image.shape for image in images] == [(3, 64, 64)] * 2
    assert [target["boxes"].tolist() for target in targets] == [
        [[8, 8, 48, 48]],
        [[4, 20, 34, 64]],
    ]  # cut at the border
    assert [target["labels"].tolist() for target in targets] == [[1], [3]]
    assert type(images[0]) is type(targets[0]["boxes"]) is torch.Tensor
    ((_, targets),) = data.val_dataloader()
    assert targets[0]["iscrowd"].tolist() == [0, 1]
    assert targets[1]["boxes"].shape == (0, 4)
    assert targets[1]["labels"].dtype == torch.int64


def test_coco_images_and_boxes_are_flipped_together(folders):
    data = opened(COCO, folders, "fit")
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        image, target = data.parts["train"][0]
        plain, same = data.parts["scoring"][0]
        flipped = not torch.equal(image, plain)
        seen.add(flipped)
        assert torch.equal(image, plain.flip(2)) == flipped
        assert target["boxes"].tolist() == ([[16, 8, 56, 48]] if flipped else same["boxes"].tolist())
    assert seen == {True, False}


@pytest.mark.parametrize("kind", [Cityscapes, DIV2K, COCO], ids=lambda k: k.__name__)
def test_folders_that_are_not_there_are_an_error_that_says_what_to_set(kind, tmp_path):
    with expect_refusal(kind.__name__, str(tmp_path), "data.init_args.root", "docs/tasks.md"):
        kind(str(tmp_path)).setup("fit")


def test_images_that_do_not_fit_are_errors(folders, tmp_path):
    shutil.copytree(folders / "div2k", tmp_path / "div2k")
    small = tmp_path / "div2k" / "DIV2K_train_LR_bicubic" / "X2"
    Image.new("RGB", (7, 20)).save(small / "0002x2.png")
    with expect_refusal("0002.png", "2 times as large", "(40, 32)", "(20, 7)"):
        opened(DIV2K, tmp_path, "fit", in_memory=True)
    with expect_refusal("17 pixels or more", "(20, 16)", "data.init_args.patch"):
        opened(DIV2K, folders, "fit", patch=17).parts["train"][0]
    (small / "0003x2.png").unlink()
    with expect_refusal("each of 3 large ones", "1 missing", "0003x2.png"):
        opened(DIV2K, tmp_path, "fit")
    for file in (tmp_path / "div2k" / "DIV2K_valid_HR").iterdir():
        file.unlink()
    with expect_refusal("Expected images", "DIV2K_valid_HR", "found none"):
        opened(DIV2K, tmp_path, "validate")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cityscapes(min_scale=2.0, max_scale=1.0), ["min_scale <= max_scale", "2.0", "1.0"]),
        (lambda: Cityscapes(crop_height=0), ["crop of one pixel", "0x769"]),
        (lambda: DIV2K(patch=0), ["patch to be a whole number of 1 or more", "0"]),
        (lambda: DIV2K(val_samples=0), ["val_samples to be a whole number of 1 or more", "0"]),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, words):
    with expect_refusal(*words):
        make()
