"""Expander masks: degrees counted by loops, nestedness, and the spectrum of a random bi-regular graph."""

from __future__ import annotations

import math

import pytest
import torch
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core.iterate import iterate
from pl_prune.core.probe import Probe
from pl_prune.criteria.expander import biregular_order

SHAPES = [
    (1, 1),
    (1, 5),
    (4, 1),
    (2, 2),
    (3, 3),
    (5, 7),
    (6, 4),
    (13, 13),
    (10, 64),
    (64, 3),
    (12, 18),
    (31, 29),
    (16, 16),
]
GENERATORS = [plp.BiRegular, plp.XNet]


def linear(out, inputs):
    return nn.Sequential(nn.Linear(inputs, out, bias=False), nn.Linear(out, 2))


def scores_of(criterion, out, inputs):
    return plp.score(linear(out, inputs), criterion)["0.weight"]


def degrees(edges, rows, columns):
    """Count by a loop."""
    by_row, by_column = [0] * rows, [0] * columns
    for r, c in edges:
        by_row[r] += 1
        by_column[c] += 1
    return by_row, by_column


def in_order(score):
    """Return the edges from the highest score to the lowest."""
    columns = score.shape[1]
    ranked = sorted(range(score.numel()), key=lambda i: -score.flatten()[i].item())
    return [(i // columns, i % columns) for i in ranked]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_number_of_edges_is_bi_regular_to_within_one(shape, seed):
    score = scores_of(plp.BiRegular(seed), *shape)
    edges = in_order(score)
    assert len(set(score.flatten().tolist())) == score.numel()
    for count in range(len(edges) + 1):
        for side in degrees(edges[:count], *shape):
            assert max(side) - min(side) <= 1, count


@pytest.mark.parametrize("shape", SHAPES)
def test_an_xnet_is_regular_on_its_smaller_side(shape):
    edges = in_order(scores_of(plp.XNet(), *shape))
    small = 1 if shape[0] >= shape[1] else 0
    for count in range(len(edges) + 1):
        side = degrees(edges[:count], *shape)[small]
        assert max(side) - min(side) <= 1, count


def test_an_xnet_draws_the_other_side_at_random():
    fields = torch.stack([(scores_of(plp.XNet(seed), 8, 32) > 0.75).sum(0) for seed in range(200)]).double()
    assert fields.sum(1).eq(64).all()
    assert fields.mean() == 2
    assert 1.3 < fields.var() < 1.7  # each of 8 rows picks one column with probability 1/4: 8 * 1/4 * 3/4
    assert (fields == 0).any()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("allocation", [plp.Layerwise(), plp.ERK(), plp.SmartRatio()], ids=lambda a: type(a).__name__)
def test_masks_of_whole_networks_are_bi_regular_and_nested(sparsity, allocation):
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Conv2d(12, 20, 3), nn.Conv2d(20, 20, 1), nn.Linear(20, 30), nn.Linear(30, 2)
    )
    scores = plp.score(model, plp.BiRegular())
    masks = allocation(scores, sparsity)
    assert masks.intersect(allocation(scores, 0.2)) == masks
    for name, mask in masks.items():
        kernels = mask.flatten(2).sum(2) if mask.ndim > 2 else mask.long()
        area = mask[0, 0].numel()
        assert int(((kernels > 0) & (kernels < area)).sum()) <= 1, name  # the last kernel may be cut
        for dim in (0, 1):
            degree = (kernels > 0).sum(dim)
            assert degree.max() - degree.min() <= 1, name


def test_groups_of_a_convolution_are_graphs_of_their_own():
    model = nn.Sequential(nn.Conv2d(8, 24, 3, groups=4), nn.ConvTranspose2d(24, 12, 3, groups=2), nn.Linear(12, 2))
    scores = plp.score(model, plp.BiRegular())
    for sparsity in (0.3, 0.55, 0.8):
        masks = plp.Layerwise()(scores, sparsity)
        for name, groups in (("0.weight", 4), ("1.weight", 2)):
            kernels = masks[name].flatten(2).any(2)
            for dim in (1, 2):
                degree = kernels.unflatten(0, (groups, -1)).sum(dim)
                assert degree.max() - degree.min() <= 1, (name, dim)
    parts = scores["0.weight"].unflatten(0, (4, 6))
    assert not torch.equal(parts[0], parts[1])


def ramanujan(rows, columns, edges):
    return math.sqrt(edges / rows - 1) + math.sqrt(edges / columns - 1)


@pytest.mark.parametrize("shape", [(64, 64), (97, 97), (64, 128), (96, 32), (48, 64), (300, 100), (120, 84)])
@pytest.mark.parametrize("degree", [4, 8, 16])
def test_the_second_singular_value_is_about_that_of_ramanujan_graphs(shape, degree):
    edges = degree * max(shape)
    values = []
    for seed in range(3):
        mask = scores_of(plp.BiRegular(seed), *shape) > 1 - edges / math.prod(shape) + 1e-6
        assert mask.sum() == edges
        first, second = torch.linalg.svdvals(mask.double())[:2]
        assert first == pytest.approx(edges / math.sqrt(math.prod(shape)), rel=1e-2)
        values.append(float(second) / ramanujan(*shape, edges))
    assert sum(values) / 3 < (1.2 if shape == (97, 97) else 1.05)


def test_a_circulant_is_no_such_expander():
    circulant = torch.zeros(64, 64, dtype=torch.float64)
    for shift in range(8):
        circulant += torch.eye(64, dtype=torch.float64).roll(shift, 1)
    assert torch.linalg.svdvals(circulant)[1] > 1.4 * ramanujan(64, 64, 512)


def test_large_layers_take_seconds_and_stay_exact():
    order = biregular_order(256, 512, torch.Generator().manual_seed(0))
    assert torch.equal(order.flatten().sort().values, torch.arange(256 * 512))
    at = order.flatten().argsort()
    assert torch.equal((at // 512).view(-1, 256).sort(1).values, torch.arange(256).expand(512, -1))
    assert torch.equal((at % 512).view(-1, 512).sort(1).values, torch.arange(512).expand(256, -1))


@pytest.mark.parametrize("cls", GENERATORS)
def test_graphs_depend_on_seed_and_name_alone(cls):
    def draw(seed, outside, dtype=torch.float32):
        torch.manual_seed(outside)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)).to(dtype)
        return plp.score(model, cls(seed))

    first = draw(0, 1)
    for same in (draw(0, 2), draw(0, 1, torch.float64), draw(0, 1, torch.bfloat16)):
        assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["0.weight"], first["1.weight"])
    assert not torch.equal(first["0.weight"], draw(1, 1)["0.weight"])
    compiled = plp.score(nn.ModuleDict({"_orig_mod": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))}), cls())
    assert torch.equal(compiled["_orig_mod.0.weight"], first["0.weight"])


@pytest.mark.parametrize("cls", GENERATORS)
@pytest.mark.parametrize("allocation", [plp.Global(min_keep_rows=1), plp.NofM()], ids=lambda a: type(a).__name__)
def test_layers_may_not_compete(cls, allocation):
    model = linear(4, 8)
    with expect_refusal(
        f"since {cls.__name__} orders the entries of a layer", type(allocation).__name__, "Use Layerwise()"
    ):
        iterate(cls(), Probe(model, {"0.weight": model[0].weight}), allocation, 0.5)
    masks, _ = iterate(cls(), Probe(model, {"0.weight": model[0].weight}), plp.Layerwise(), 0.5)
    assert masks.sparsity() == 0.5
