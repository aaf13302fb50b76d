from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import pl_prune as plp
from pl_prune.core.batch import batch_size, cut

IMAGES = [torch.full((3, 8, 8), float(i)) for i in range(5)]
BOXES = [{"boxes": torch.zeros(i + 1, 4), "labels": torch.zeros(i + 1)} for i in range(5)]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(4, 2), 4),
        ((torch.zeros(4, 2), torch.zeros(4)), 4),
        ([torch.zeros(4, 2), torch.zeros(4)], 4),
        ({"x": torch.zeros(4, 2), "y": torch.zeros(4)}, 4),
        (([torch.zeros(4, 2), torch.zeros(4, 3)], torch.zeros(4)), 4),
        (([torch.zeros(2, 2), torch.zeros(2, 3)], torch.zeros(2)), 2),  # two inputs, two samples
        ((IMAGES, torch.arange(5)), 5),
        ((IMAGES, BOXES), 5),
        ((IMAGES[:2], [{"labels": torch.zeros(2)}] * 2), 2),
    ],
)
def test_samples_are_counted_and_cut(batch, size):
    assert batch_size(batch) == size
    two = cut(batch, size, 1, 2)
    assert batch_size(two) == 1
    if batch == (IMAGES, BOXES):
        assert torch.equal(two[0][0], IMAGES[1])
        assert two[1] == [BOXES[1]]


def test_a_list_of_images_is_scored_whatever_the_cut():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double()
    images, labels = [torch.randn(3, 8, 8, dtype=torch.float64) for _ in range(5)], torch.arange(5)
    loss = lambda m, b: nn.functional.cross_entropy(m(torch.stack(b[0])), b[1])  # noqa: E731
    for criterion in (plp.GradNorm(), plp.FisherDiagonal()):
        whole = plp.score(net, criterion, [(images, labels)], loss)
        parts = plp.score(net, criterion, [(images[:1], labels[:1]), (images[1:], labels[1:])], loss)
        stacked = plp.score(net, criterion, [(torch.stack(images), labels)], lambda m, b: loss(m, (list(b[0]), b[1])))
        torch.testing.assert_close(whole, parts)
        torch.testing.assert_close(whole, stacked)


def test_two_inputs_and_two_targets_are_batches_of_tensors():
    pairs = [[torch.randn(5, 3), torch.randn(5, 3)], [torch.randn(5, 1), torch.randn(5, 1)]]
    assert batch_size(pairs) == 5
    (x1, x2), (y1, y2) = cut(pairs, 5, 1, 3)
    assert [len(t) for t in (x1, x2, y1, y2)] == [2, 2, 2, 2]


class Named(NamedTuple):
    images: list
    targets: list


def test_named_batches_keep_their_names():
    two = cut(Named(IMAGES, BOXES), 5, 1, 2)
    assert torch.equal(two.images[0], IMAGES[1])
    assert two.targets == [BOXES[1]]
