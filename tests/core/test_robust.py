from __future__ import annotations

import itertools
import statistics
from decimal import Decimal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.core.types import prune_count

LOCATIONS = ["median", "mean"]
SPARSITIES = [0.05, 0.3, 0.6838, 0.9, 0.97]
SHAPES = {"first": (16, 3, 3, 3), "wide": (12, 8, 3, 3), "deep": (16, 24), "vector": (11,)}
every_location = pytest.mark.parametrize("location", LOCATIONS)


def layers(seed=0):
    """Heavy-tailed scores whose scale and centre differ by layer, no two equal."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64).abs() ** (1 + i)) * 10.0 ** (-i) + i
        for i, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.fixture
def deterministic_cuda(monkeypatch):
    """Refuse what CUDA refuses under `Trainer(deterministic=True)`, on the CPU."""

    def refuse(*args, **kwargs):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation")

    monkeypatch.setattr(torch.Tensor, "kthvalue", refuse)
    monkeypatch.setattr(torch, "kthvalue", refuse)


@pytest.mark.usefixtures("deterministic_cuda")
@pytest.mark.parametrize("count", [10, 11])
def test_medians_need_nothing_that_cuda_cannot_do_deterministically(count):
    scores = {"a": torch.rand(count), "b": torch.rand(count + 2) ** 3}
    assert same(plp.Robust()(scores, 0.5), oracle(scores, 0.5, "median")[0])
    layer = torch.nn.Sequential(torch.nn.Linear(count, 5), torch.nn.Linear(5, 1))
    plain, found = (plp.score(layer, plp.YOPO(rank=0, normalize=n))["0.weight"] for n in (False, True))
    middle = statistics.median(layer[0].weight.detach().abs().flatten().tolist())
    torch.testing.assert_close(found, plain / middle)


def stat(values, location):
    """Location and scale as the paper names them, of plain numbers."""
    if location == "mean":
        return statistics.fmean(values), statistics.pstdev(values)
    center = statistics.median(values)
    return center, statistics.median([abs(v - center) for v in values])


def rescued(score, rows, columns):
    """The best entries of every row and column of one layer."""
    keep = torch.zeros_like(score, dtype=torch.bool)
    for dim, count in ((0, rows), (1, columns)):
        if score.ndim > 1:
            for i in range(score.shape[dim]):
                one = keep.select(dim, i)
                best = score.select(dim, i).reshape(-1).topk(min(count, one.numel())).indices
                flat = one.reshape(-1)
                flat[best] = True
                one.copy_(flat.view(one.shape))
    return keep


def mort(scores, sparsity, mode, location, rows=0, columns=0):
    """Algorithm 2: bisect alpha until the masks score > location + alpha * scale, floors enforced, prune enough.

    `mode` "global" pools the scores (lines 5 to 13), "text" has one alpha and a location and scale for each layer
    (equations 10 to 12), "layerwise" is called with one layer. Alpha may be negative, which the paper's bracket rules out.
    """
    everything = [v for s in scores.values() for v in s.reshape(-1).tolist()]
    pooled = stat(everything, location)
    stats = {name: pooled if mode == "global" else stat(s.reshape(-1).tolist(), location) for name, s in scores.items()}
    floors = {name: rescued(s, rows, columns) for name, s in scores.items()}

    def masks(alpha):
        return {name: (s > stats[name][0] + alpha * stats[name][1]) | floors[name] for name, s in scores.items()}

    def pruned(alpha):
        return sum(int((~m).sum()) for m in masks(alpha).values())

    wanted = prune_count(sparsity, len(everything))
    low, high = -1.0, 1.0
    while pruned(low) >= wanted:
        low *= 2
    while pruned(high) < wanted:
        high *= 2
    for _ in range(80):
        alpha = (low + high) / 2
        low, high = (alpha, high) if pruned(alpha) < wanted else (low, alpha)
    return masks(high)


def same(masks, expected):
    assert sum(int(m.sum()) for m in expected.values()) == sum(kept for kept, _ in masks.counts().values())
    return all(torch.equal(masks[name], mask) for name, mask in expected.items())


@every_location
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 0), (2, 1)])
def test_the_closed_form_is_the_bisection_of_algorithm_2(location, sparsity, rows, columns):
    scores = layers()
    if rows and sparsity > 0.9:
        sparsity = 0.93  # all that the floors leave
    floors = {"min_keep_rows": rows, "min_keep_cols": columns}
    text = mort(scores, sparsity, "text", location, rows, columns)
    assert same(plp.Robust(location=location, **floors)(scores, sparsity), text)
    pooled = mort(scores, sparsity, "global", location, rows, columns)
    assert same(plp.Global(**floors)(scores, sparsity), pooled)
    assert same(plp.Robust(scope="pooled", location=location, **floors)(scores, sparsity), pooled)


@every_location
def test_the_text_and_algorithm_2_choose_other_masks(location):
    assert plp.Robust(location=location)(layers(), 0.9).hamming(plp.Global()(layers(), 0.9)) > 0


@every_location
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_layerwise_is_the_bisection_of_each_layer(location, sparsity):
    scores = layers()
    masks = plp.Layerwise()(scores, sparsity)
    for name, score in scores.items():
        kept, total = masks.counts()[name]
        own = float(Decimal(total - kept) / total)
        assert abs(own - sparsity) <= 1 / total
        if 0 < kept < total:
            assert torch.equal(mort({name: score}, own, "layerwise", location)[name], masks[name])


def oracle(scores, sparsity, location):
    """Sort standardized scores, float64, entry by entry; return the masks, and how close the first pruned came."""
    order = []
    for i, (name, score) in enumerate(scores.items()):
        values = score.reshape(-1).tolist()
        center, scale = stat(values, location)
        scale = scale or stat(values, "mean")[1] or 1.0
        order += [(-(v - center) / scale, i, j, name) for j, v in enumerate(values)]
    keep = len(order) - prune_count(sparsity, len(order))
    order.sort()
    kept = {name: torch.zeros(score.numel(), dtype=torch.bool) for name, score in scores.items()}
    for _, _, j, name in order[:keep]:
        kept[name][j] = True
    gap = order[keep][0] - order[keep - 1][0] if 0 < keep < len(order) else 1.0
    return {name: mask.view(scores[name].shape) for name, mask in kept.items()}, gap


small = st.lists(st.integers(-8, 8), min_size=1, max_size=9)


@every_location
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(small, min_size=1, max_size=4), st.integers(0, 99))
def test_against_sorted_standardized_scores(location, values, percent):
    # Small integers: ties within and between layers, layers of equal scores, MADs of zero.
    scores = {f"l{i}": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    expected, gap = oracle(scores, percent / 100, location)
    assume(gap > 1e-9 or (gap == 0 and location == "median"))
    assert same(plp.Robust(location=location)(scores, percent / 100), expected)


@every_location
def test_neither_scale_nor_shift_of_a_layer_matters(location):
    scores = layers()
    masks = plp.Robust(location=location)(scores, 0.7)
    moved = {name: 2.0**i * s - i for i, (name, s) in enumerate(scores.items())}
    assert plp.Robust(location=location)(moved, 0.7) == masks
    assert plp.Global()(moved, 0.7) != plp.Global()(scores, 0.7)
    far = {name: 2.0 ** (600 * (-1) ** i) * s for i, (name, s) in enumerate(scores.items())}
    assert plp.Robust(location=location)(far, 0.7) == masks


def test_alike_distributions_are_pruned_alike():
    scores = {f"l{i}": torch.randn(4000, generator=torch.Generator().manual_seed(i)) * 10.0**-i for i in range(3)}
    assert min(kept for kept, _ in plp.Global()(scores, 0.9).counts().values()) == 0
    for kept, total in plp.Robust()(scores, 0.9).counts().values():
        assert abs(kept / total - 0.1) < 0.02


def test_a_mad_of_zero_gives_way_to_the_standard_deviation():
    spiked = torch.tensor([0.0] * 9 + [4.0])
    scores = {"spiked": spiked, "even": torch.arange(10.0)}
    assert stat(spiked.tolist(), "median")[1] == 0
    # 4 / 1.2 above the centre, against (9 - 4.5) / 2.5 for the best of the other layer
    assert plp.Robust()(scores, 0.95).counts() == {"spiked": (1, 10), "even": (0, 10)}
    scores["spiked"] = torch.tensor([0.0] * 6 + [1.0, 1.0, 1.0, 4.0])
    assert same(plp.Robust()(scores, 0.7), oracle(scores, 0.7, "median")[0])


@every_location
def test_a_layer_of_equal_scores_stands_at_its_centre(location):
    scores = {"equal": torch.full((10,), -0.1), "even": torch.arange(11.0)}
    masks = plp.Robust(location=location)(scores, 1 - 5 / 21)
    assert masks.counts() == {"equal": (0, 10), "even": (5, 11)}
    assert plp.Robust(location=location)(scores, 1 - 15 / 21)["equal"].sum() >= 9


@every_location
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_standardizing_rounds_away_still_counts_in_its_layer(location, dtype):
    low, high = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / 4
    values = [3 * low, low, high, 2 * low, 0.0, -high]
    scores = {"wide": torch.tensor(values, dtype=dtype), "even": torch.arange(6, dtype=dtype)}
    for pruned in range(12):
        mask = plp.Robust(location=location)(scores, pruned / 12)["wide"].tolist()
        best = sorted(range(6), key=lambda j: -values[j])[: sum(mask)]
        assert [j for j in range(6) if mask[j]] == sorted(best)


@every_location
def test_masks_are_nested_with_floors(location):
    scores = layers(seed=3)
    masks = [plp.Robust(location=location, min_keep_rows=2, min_keep_cols=1)(scores, s / 100) for s in range(0, 90, 6)]
    for denser, sparser in itertools.pairwise(masks):
        assert denser.intersect(sparser) == sparser


def test_settings_that_are_none():
    with expect_refusal("Robust.location", "'median', 'mean'", "found 'mode'"):
        plp.Robust(location="mode")
    with expect_refusal("Robust.scope", "'standardized', 'pooled'", "found 'layer'"):
        plp.Robust(scope="layer")
    with expect_refusal("min_keep_rows", "found -1"):
        plp.Robust(min_keep_rows=-1)
