"""Every criterion of Table A21 of Gollini Navarrete et al., summed over the structures of a small vision transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.vision_transformer import VisionTransformer

import pl_prune as plp

POINTS = [0.2, 0.36, 0.52, 0.64, 0.75, 0.84, 0.91, 0.99]
ALONE = [  # an entry's score does not depend on which others are scored
    plp.Magnitude(),
    plp.GradNorm(),
    plp.SNIP(),
    plp.FisherDiagonal(),
    plp.FisherPruning(),
    plp.FisherTaylor(),
]
TOGETHER = [
    plp.Random(),
    plp.GraSP(),
    plp.GraSP(inverted=True, temperature=1),
    plp.HutchinsonDiagonal(probes=2, probe_per="sample"),
    plp.HutchinsonPruning(probes=2, probe_per="sample"),
    plp.HutchinsonTaylor(probes=2, probe_per="sample"),
    plp.GaussNewtonPruning(probes=2),
]
HEADS, WIDTH, HIDDEN = 20, 80, 160


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 2, HEADS, WIDTH, HIDDEN, num_classes=3)
    torch.nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision's zeros would let no gradient through
    x = torch.randn(6, 3, 16, 16)
    return model, plp.trace_groups(model, x[:1], exact=False), [(x, torch.arange(6) % 3)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_structures_are_heads_hidden_units_and_the_stream(problem):
    _, groups, _ = problem
    assert sorted(groups.sizes.values()) == [HEADS, HEADS, WIDTH, HIDDEN, HIDDEN]


@pytest.mark.parametrize("criterion", ALONE, ids=lambda c: type(c).__name__)
def test_a_structure_scores_the_sum_over_its_weights(criterion, problem):
    model, groups, batches = problem
    units = plp.score_groups(model, plp.ByGroup(criterion), groups, batches, loss)
    entries = plp.score(model, criterion, batches, loss)
    layer = "encoder.layers.encoder_layer_0"
    hidden = entries[f"{layer}.mlp.0.weight"].double().sum(1)
    torch.testing.assert_close(units[f"{layer}.mlp.0"].double(), hidden, rtol=1e-3, atol=1e-9)
    heads = entries[f"{layer}.self_attention.in_proj_weight"].double().view(3, HEADS, -1).sum((0, 2))
    torch.testing.assert_close(units[f"{layer}.self_attention"].double(), heads, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    "criterion", ALONE + TOGETHER, ids=lambda c: f"{type(c).__name__}-{getattr(c, 'inverted', '')}"
)
def test_every_criterion_tells_structures_apart(criterion, problem):
    model, groups, batches = problem
    units = plp.score_groups(model, plp.ByGroup(criterion), groups, batches, loss)
    assert {root: len(score.unique()) for root, score in units.items()} == groups.sizes
    keep = plp.select_units(units, groups, 0.75, "macs", plp.Layerwise())
    assert groups.cost(keep)[1] <= 0.25 * groups.cost({})[1]


@pytest.mark.parametrize("sparsity", POINTS)
def test_every_point_can_be_reached_in_every_layer_alike(sparsity, problem):
    model, groups, _ = problem
    units = plp.score_groups(model, plp.ByGroup(plp.Magnitude()), groups)
    keep = plp.select_units(units, groups, sparsity, "macs", plp.Layerwise())
    left = groups.cost(keep)[1] / groups.cost({})[1]
    assert left <= 1 - sparsity
    assert left == pytest.approx(1 - sparsity, abs=0.02)
    shares = [float(mask.double().mean()) for mask in keep.values()]
    assert max(shares) - min(shares) < 0.1
    small = plp.shrink(model, groups.expand(keep), torch.randn(1, 3, 16, 16), groups)
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 3)
