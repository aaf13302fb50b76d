"""SmartRatio against seats sorted as rationals, and against the formula of its paper."""

from __future__ import annotations

import contextlib
import itertools
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import expect_refusal

import pl_prune as plp
from pl_prune import MaskSet

HALF = Fraction(1, 2)
FAST = settings(max_examples=60, deadline=None, derandomize=True)
SHAPES = [(4, 3, 3, 3), (8, 4, 3, 3), (8, 8, 1, 1), (6, 5, 2), (10, 8), (7, 3), (5,)]
sparsities = st.one_of(st.integers(0, 999).map(lambda i: i / 1000), st.floats(0, 1, exclude_max=True))
shape_lists = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6)
networks = st.sampled_from(["resnet", "vgg"])


def random_scores(shapes):
    torch.manual_seed(len(shapes))
    return {f"l{i}": torch.rand(shape) for i, shape in enumerate(shapes)}


def ratio(i, depth, network):
    """Return k^2 + k for layer i from 0 at the input, over (i + 1)^2 for VGG."""
    k = depth - i
    return Fraction(k * k + k, (i + 1) ** 2 if network == "vgg" else 1)


def oracle(shapes, sparsity, linear_keep, network):
    """Return the kept entries of each layer: linear layers' part of the budget, and in both parts sorted seats."""
    depth, sizes = len(shapes), [torch.Size(s).numel() for s in shapes]
    keep = sum(sizes) - int((Decimal(repr(sparsity)) * sum(sizes)).to_integral_value(ROUND_HALF_UP))
    linear = {i for i, s in enumerate(shapes) if len(s) <= 2}
    rest = sum(n for i, n in enumerate(sizes) if i not in linear)
    part = int((Decimal(repr(linear_keep)) * sum(sizes[i] for i in linear)).to_integral_value(ROUND_HALF_UP))
    part = max(min(part, keep // 2), keep - rest)
    if len(linear) == depth:
        part = keep
    counts = [0] * depth
    for layers, budget in ((sorted(linear), part), (sorted(set(range(depth)) - linear), keep - part)):
        weight = {i: sizes[i] * (1 if i in linear else ratio(i, depth, network)) for i in layers}
        seats = sorted(((rank + HALF) / weight[i], i) for i in layers for rank in range(sizes[i]))
        for _, i in seats[:budget]:
            counts[i] += 1
    return counts


def counts_of(masks):
    return [kept for kept, _ in masks.counts().values()]


@FAST
@given(shape_lists, sparsities, st.sampled_from([0.3, 0.05, 1.0]), networks)
def test_against_sorted_rationals(shapes, sparsity, linear_keep, network):
    scores = random_scores(shapes)
    masks = plp.SmartRatio(linear_keep, network)(scores, sparsity)
    assert counts_of(masks) == oracle(shapes, sparsity, linear_keep, network)
    for name, mask in masks.items():
        kept, pruned = scores[name][mask], scores[name][~mask]
        assert not len(kept) or not len(pruned) or kept.min() >= pruned.max()


def resnet20():
    plan = [(3, 16), *[(16, 16)] * 6, (16, 32), *[(32, 32)] * 5, (32, 64), *[(64, 64)] * 5]
    return [(out, inputs, 3, 3) for inputs, out in plan] + [(10, 64)]


@pytest.mark.parametrize("network", ["resnet", "vgg"])
@pytest.mark.parametrize("sparsity", [0.95, 0.98, 0.99])
def test_resnet20_has_the_densities_of_the_paper(sparsity, network):
    shapes = resnet20()
    sizes = [torch.Size(s).numel() for s in shapes]
    counts = counts_of(plp.SmartRatio(network=network)(random_scores(shapes), sparsity))
    assert counts[-1] == 192  # 0.3 of 640
    assert sum(counts) == sum(sizes) - round(sparsity * sum(sizes))
    wanted = [size * float(ratio(i, len(sizes), network)) for i, size in enumerate(sizes[:-1])]
    free = [i for i, (count, size) in enumerate(zip(counts[:-1], sizes, strict=False)) if count < size]
    left = sum(counts[i] for i in free)
    for i in free:
        assert abs(counts[i] - left * wanted[i] / sum(wanted[j] for j in free)) <= 1, i
    assert (network == "vgg") == (len(free) < 19)  # caps bind in one of the two
    density = [count / size for count, size in zip(counts[:-1], sizes, strict=False)]
    assert density == sorted(density, reverse=True)


def test_linear_layers_take_half_of_the_budget_at_most_until_convolutions_are_whole():
    scores = random_scores([(10, 10, 1, 1), (100, 10), (50, 10)])  # 100 and 1500
    for sparsity, expected in [(0.5, [100, 467, 233]), (0.71875, [100, 233, 117]), (0.9375, [50, 33, 17])]:
        assert counts_of(plp.SmartRatio()(scores, sparsity)) == expected
    assert counts_of(plp.SmartRatio(linear_keep=0.01)(scores, 0.93125)) == [95, 10, 5]


@FAST
@given(shape_lists, st.lists(sparsities, min_size=2, max_size=4), networks, st.integers(0, 2), st.integers(0, 2))
def test_masks_are_nested_and_floors_hold(shapes, levels, network, rows, per_layer):
    scores, masks = random_scores(shapes), []
    allocation = plp.SmartRatio(network=network, min_keep_rows=rows, min_per_layer=per_layer)
    for sparsity in sorted(levels):
        with contextlib.suppress(plp.PruneError):
            masks.append(allocation(scores, sparsity))
    assert masks or sorted(levels)[0] > 0.1
    for mask in itertools.chain.from_iterable(m.values() for m in masks):
        assert mask.sum() >= min(per_layer, mask.numel())
        assert mask.ndim < 2 or (mask.flatten(1).sum(1) >= min(rows, mask[0].numel())).all()
    for denser, sparser in itertools.pairwise(masks):
        assert denser.intersect(sparser) == sparser


def test_within_counts_as_size():
    scores = random_scores([(4, 3, 3, 3), (8, 4, 3, 3), (10, 8)])
    within = MaskSet({name: score > 0.5 for name, score in scores.items()})
    masks = plp.SmartRatio()(scores, 0.6, within)
    assert masks.intersect(within) == masks
    assert sum(counts_of(masks)) == 476 - 286
    assert plp.SmartRatio()(scores, 0.9, plp.SmartRatio()(scores, 0.6)) == plp.SmartRatio()(scores, 0.9)


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, True, "0.3", float("nan")])
def test_a_share_that_is_no_fraction(keep):
    with expect_refusal("linear_keep to be a fraction in (0, 1]", f"found {keep!r}"):
        plp.SmartRatio(linear_keep=keep)


def test_a_network_of_another_kind():
    with expect_refusal("network to be one of 'resnet', 'vgg'", "'vit'"):
        plp.SmartRatio(network="vit")
