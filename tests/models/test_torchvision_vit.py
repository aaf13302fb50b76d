from __future__ import annotations

import pytest
import torch
from refusal import expect_refusal
from torchvision import models
from torchvision.models import vision_transformer

import pl_prune as plp
from pl_prune.models.torchvision_vit import vit_b_16


@pytest.fixture
def small(monkeypatch):
    """Let torchvision build a ViT of two narrow layers, whose weights are those of seed 7."""

    def build(image_size=224, weights=None):
        torch.manual_seed(0 if weights is None else 7)
        return vision_transformer.VisionTransformer(image_size, 16, 2, 2, 8, 16, num_classes=11)

    monkeypatch.setattr(models, "vit_b_16", build)
    return build


def test_weights_are_torchvisions_with_positions_for_the_images_and_a_new_head(small):
    found, source = vit_b_16(64, 3, "IMAGENET1K_V1").state_dict(), small(weights="any").state_dict()
    new = {"heads.head.weight", "heads.head.bias", "encoder.pos_embedding"}
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], source[name]) for name in source.keys() - new)
    assert found["heads.head.weight"].shape == (3, 8)
    positions = source["encoder.pos_embedding"]
    assert torch.equal(found["encoder.pos_embedding"][:, 0], positions[:, 0])
    grid = positions[0, 1:].T.reshape(1, 8, 14, 14)
    resized = torch.nn.functional.interpolate(grid, size=4, mode="bicubic", align_corners=True)
    torch.testing.assert_close(found["encoder.pos_embedding"][0, 1:].T.reshape(1, 8, 4, 4), resized)


@pytest.mark.parametrize("size", [32, 48])
def test_gradients_reach_every_layer(small, size):
    network = vit_b_16(size, 5)
    x = torch.randn(2, 3, size, size)
    assert network(x).shape == (2, 5)
    assert network.num_classes == 5
    scores = plp.score(
        network, plp.SNIP(), [(x, torch.tensor([0, 1]))], lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1])
    )
    assert all(bool((score > 0).any()) for score in scores.values())


def test_images_that_patches_do_not_divide_are_refused():
    with expect_refusal("multiple of 16", "found 100", "Take 96"):
        vit_b_16(100)
    with expect_refusal("found 8", "Take 16"):
        vit_b_16(8)
