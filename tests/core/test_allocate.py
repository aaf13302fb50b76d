from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusal import expect_refusal

import pl_prune as plp
from pl_prune import MaskSet

HALF = Fraction(1, 2)
WEIGHT = {"Layerwise": lambda shape: torch.Size(shape).numel(), "ERK": sum}
VALUES = [0.0, -0.0, 1.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 3e38]
DOUBLES = [5e-324, 1 + 2**-52, -1e300]
ALLOCATIONS = [plp.Global, plp.Layerwise, plp.ERK]
FAST = settings(max_examples=50, deadline=None, derandomize=True)
sparsities = st.one_of(st.integers(0, 999).map(lambda i: i / 1000), st.floats(0, 1, exclude_max=True))


@dataclass
class Layer:
    """A parameter as plain numbers in flat order."""

    shape: tuple[int, ...]
    values: list[Fraction]
    pool: list[bool]

    def best(self, entries):
        return sorted((j for j in entries if self.pool[j]), key=lambda j: (-self.values[j], j))

    def slices(self, dim):
        places = list(itertools.product(*map(range, self.shape)))
        return [[j for j, place in enumerate(places) if place[dim] == i] for i in range(self.shape[dim])]

    def required(self, rows, cols, per_layer):
        found = set(self.best(range(len(self.values)))[:per_layer])
        if len(self.shape) > 1:
            for dim, floor in enumerate((rows, cols)):
                for entries in self.slices(dim):
                    found.update(self.best(entries)[:floor])
        return found


def oracle(kind, scores, sparsity, within=None, rows=0, cols=0, per_layer=0):
    """Return the kept flat indices by layer, or None where the floors do not fit; sorts exact rationals and nothing else."""
    layers = []
    for name, score in scores.items():
        pool = [True] * score.numel() if within is None else within[name].reshape(-1).tolist()
        layers.append(Layer(tuple(score.shape), [Fraction(v) for v in score.double().reshape(-1).tolist()], pool))
    total = sum(len(layer.values) for layer in layers)
    keep = total - int((Decimal(repr(sparsity)) * total).to_integral_value(ROUND_HALF_UP))
    kept = [layer.required(rows, cols, per_layer) for layer in layers]
    spare = keep - sum(map(len, kept))
    if spare < 0:
        return None
    rest = [
        [j for j in layer.best(range(len(layer.values))) if j not in k] for layer, k in zip(layers, kept, strict=True)
    ]
    if kind == "Global":
        order = sorted((-layers[i].values[j], i, j) for i, entries in enumerate(rest) for j in entries)
        for _, i, j in order[:spare]:
            kept[i].add(j)
    else:
        weights = [WEIGHT[kind](layer.shape) for layer in layers]
        seats = sorted(
            ((len(kept[i]) + extra + HALF) / weights[i], i)
            for i, entries in enumerate(rest)
            for extra in range(len(entries))
        )
        for i, entries in enumerate(rest):
            kept[i].update(entries[: sum(seat[1] == i for seat in seats[:spare])])
    return [sorted(k) for k in kept]


def kept_by(masks):
    return [mask.reshape(-1).nonzero()[:, 0].tolist() for mask in masks.values()]


@st.composite
def score_sets(draw):
    shapes = draw(
        st.one_of(
            st.just([(6,), (6,), (2,)]),
            st.lists(
                st.sampled_from([(1,), (5,), (2, 3), (3, 2), (4, 1), (3, 2, 2), (2, 2, 1, 2)]), min_size=1, max_size=4
            ),
        )
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    entry = st.sampled_from(VALUES + DOUBLES * (dtype == torch.float64))
    if draw(st.booleans()):
        entry = st.one_of(entry, st.floats(-10, 10, width=32))
    scores = {}
    for i, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        scores[f"l{i}"] = torch.tensor(draw(st.lists(entry, min_size=size, max_size=size)), dtype=dtype).view(shape)
    return scores


@st.composite
def score_sets_within(draw):
    scores = draw(score_sets())
    pool = {}
    for name, score in scores.items():
        inside = draw(st.lists(st.sampled_from([True, True, False]), min_size=score.numel(), max_size=score.numel()))
        pool[name] = torch.tensor(inside).bool().view(score.shape)
    return scores, MaskSet(pool)


floors = st.fixed_dictionaries({
    "min_keep_rows": st.integers(0, 2),
    "min_keep_cols": st.integers(0, 2),
    "min_per_layer": st.integers(0, 3),
})


def short(floor):
    return {"rows": floor["min_keep_rows"], "cols": floor["min_keep_cols"], "per_layer": floor["min_per_layer"]}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@FAST
@given(score_sets(), sparsities)
def test_against_sorted_rationals(allocation, scores, sparsity):
    assert kept_by(allocation()(scores, sparsity)) == oracle(allocation.__name__, scores, sparsity)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@FAST
@given(score_sets(), sparsities, floors)
def test_floors_against_sorted_rationals(allocation, scores, sparsity, floor):
    expected = oracle(allocation.__name__, scores, sparsity, **short(floor))
    if expected is not None:
        assert kept_by(allocation(**floor)(scores, sparsity)) == expected
        return
    with pytest.raises(plp.PruneError, match="to fit into the") as caught:
        allocation(**floor)(scores, sparsity)
    advice = float(re.search(r"Lower the sparsity to ([\d.]+) or below", str(caught.value))[1])
    possible = allocation(**floor)(scores, advice)
    assert kept_by(possible) == oracle(allocation.__name__, scores, advice, **short(floor))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@FAST
@given(score_sets_within(), sparsities, floors)
def test_within_against_sorted_rationals(allocation, problem, sparsity, floor):
    scores, within = problem
    available = sum(kept for kept, _ in within.counts().values())
    keep = sum(s.numel() for s in scores.values()) - sum(
        int((~m).sum()) for m in allocation()(scores, sparsity).values()
    )
    if available < keep:
        with expect_refusal(f"{keep} entries to keep", f"only {available} in `within`", "higher sparsity"):
            allocation()(scores, sparsity, within)
        return
    layers = [
        Layer(tuple(s.shape), [Fraction(0)] * s.numel(), within[n].reshape(-1).tolist()) for n, s in scores.items()
    ]
    everywhere = [Layer(layer.shape, layer.values, [True] * len(layer.values)) for layer in layers]
    assume(all(holds(layer, whole, floor) for layer, whole in zip(layers, everywhere, strict=True)))
    expected = oracle(allocation.__name__, scores, sparsity, within, **short(floor))
    assume(expected is not None)
    assert kept_by(allocation(**floor)(scores, sparsity, within)) == expected


def holds(layer, whole, floor):
    """Say whether the pool of a layer has as many entries in every slice as the floors ask for, or the slice has."""
    enough = len(layer.best(range(len(layer.values)))) >= min(floor["min_per_layer"], len(layer.values))
    for dim, count in enumerate((floor["min_keep_rows"], floor["min_keep_cols"])):
        if len(layer.shape) > 1:
            enough &= all(
                len(layer.best(entries)) >= min(count, len(whole.best(entries))) for entries in layer.slices(dim)
            )
    return enough


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@FAST
@given(score_sets(), st.lists(sparsities, min_size=2, max_size=4), floors)
def test_masks_over_growing_sparsity_are_nested(allocation, scores, levels, floor):
    levels = [s for s in sorted(levels) if oracle("Global", scores, s, **short(floor)) is not None]
    assume(len(levels) > 1)
    masks = [allocation(**floor)(scores, s) for s in levels]
    for denser, sparser in itertools.pairwise(masks):
        assert denser.intersect(sparser) == sparser


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_sizes_6_6_2_are_nested_at_every_count(allocation):
    scores = {"a": torch.rand(6), "b": torch.rand(6), "c": torch.rand(2)}
    masks = [allocation()(scores, pruned / 14) for pruned in range(14)]
    assert [sum(kept for kept, _ in m.counts().values()) for m in masks] == list(range(14, 0, -1))
    for denser, sparser in itertools.pairwise(masks):
        assert denser.intersect(sparser) == sparser


def test_layerwise_keeps_the_same_fraction_of_every_layer():
    scores = {"a": torch.rand(1000), "b": torch.rand(50, 4), "c": torch.rand(10)}
    assert plp.Layerwise()(scores, 0.9).counts() == {"a": (100, 1000), "b": (20, 200), "c": (1, 10)}
    for pruned in range(1, 100):
        for name, (kept, total) in plp.Layerwise()(scores, pruned / 100).counts().items():
            assert abs(kept - total * (1 - pruned / 100)) <= 1, name


@pytest.mark.parametrize(("sparsity", "full"), [(0.97, set()), (0.9, {"first", "head"})])
def test_erk_keeps_in_proportion_to_the_sum_of_dimensions_up_to_the_whole_layer(sparsity, full):
    shapes = {"first": (8, 3, 3, 3), "wide": (64, 32, 3, 3), "deep": (64, 64, 3, 3), "head": (10, 64)}
    counts = plp.ERK()({name: torch.rand(shape) for name, shape in shapes.items()}, sparsity).counts()
    assert {name for name, (kept, total) in counts.items() if kept == total} == full
    free = {name: sum(shape) for name, shape in shapes.items() if name not in full}
    left = sum(counts[name][0] for name in free)
    for name, weight in free.items():
        assert abs(counts[name][0] - left * weight / sum(free.values())) <= 1, name


def densities_of_evci(shapes, keep):
    """Solve for the factor of (n_in + n_out + kh + kw) / (n_in n_out kh kw), over and over with what exceeds 1 whole."""
    size = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    raw = {name: Fraction(sum(shape), size[name]) for name, shape in shapes.items()}
    whole: set[str] = set()
    while True:
        left = keep - sum(size[name] for name in whole)
        factor = left / sum(raw[name] * size[name] for name in shapes if name not in whole)
        over = {name for name in shapes if name not in whole and factor * raw[name] > 1}
        if not over:
            return {name: 1 if name in whole else factor * raw[name] for name in shapes}
        whole |= over


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99])
def test_erk_with_random_scores_has_the_densities_of_evci(sparsity):
    plan = [(3, 16), *[(16, 16)] * 6, (16, 32), *[(32, 32)] * 5, (32, 64), *[(64, 64)] * 5]
    layers = [torch.nn.Conv2d(i, o, 3, bias=False) for i, o in plan] + [torch.nn.Linear(64, 10), torch.nn.Linear(10, 2)]
    scores = plp.score(torch.nn.Sequential(*layers), plp.Random())
    masks = plp.ERK()(scores, sparsity)
    total = sum(score.numel() for score in scores.values())
    keep = sum(kept for kept, _ in masks.counts().values())
    assert keep == total - round(sparsity * total)
    expected = densities_of_evci({name: tuple(score.shape) for name, score in scores.items()}, keep)
    for name, (kept, size) in masks.counts().items():
        assert abs(kept - expected[name] * size) < 2, name  # Webster's rule may be off by more than 1
        order = scores[name].flatten().argsort(descending=True)
        assert masks[name].flatten()[order[:kept]].all()
    assert (max(expected.values()) == 1) == (sparsity < 0.98)


def test_global_lets_layers_compete():
    scores = {"low": torch.arange(4.0), "high": torch.arange(4.0) + 10}
    assert plp.Global()(scores, 0.5).counts() == {"low": (0, 4), "high": (4, 4)}
    assert plp.Global(min_per_layer=1)(scores, 0.5).counts() == {"low": (1, 4), "high": (3, 4)}


def test_row_and_column_floors_rescue_the_best_of_their_slice():
    scores = {"w": torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 1.0], [6.0, 5.0, 4.0]])}
    assert plp.Global()(scores, 6 / 9)["w"].tolist() == [[True] * 3, [False] * 3, [False] * 3]
    rows = plp.Global(min_keep_rows=1)(scores, 6 / 9)["w"]
    assert rows.tolist() == [[True, False, False], [False, True, False], [True, False, False]]
    assert plp.Global(min_keep_cols=1)({"w": scores["w"].T}, 6 / 9)["w"].tolist() == rows.T.tolist()
    both = plp.Global(min_keep_rows=1, min_keep_cols=1)(scores, 4 / 9)["w"]
    assert both.tolist() == [[True, True, True], [False, True, False], [True, False, False]]


def test_floors_of_slices_pass_over_vectors():
    scores = {"vector": torch.zeros(4), "matrix": torch.ones(2, 2)}
    assert plp.Global(min_keep_rows=1, min_keep_cols=1)(scores, 0.5).counts() == {"vector": (0, 4), "matrix": (4, 4)}


def test_floors_that_cannot_hold():
    scores = {"a": torch.rand(5, 4), "b": torch.rand(10)}
    with expect_refusal(
        "min_keep_rows=2",
        "min_keep_cols=0",
        "min_per_layer=3",
        "into the 3 of 30",
        "sparsity 0.9",
        "need 13",
        "to 0.566667",
    ):
        plp.Global(min_keep_rows=2, min_per_layer=3)(scores, 0.9)


def test_floors_that_cannot_hold_within():
    within = MaskSet({"w": torch.tensor([[True, True], [False, False]])})
    for floor in ({"min_keep_rows": 1}, {"min_keep_cols": 2}, {"min_per_layer": 3}):
        with expect_refusal("within"):
            plp.Global(**floor)({"w": torch.rand(2, 2)}, 0.5, within)


@pytest.mark.parametrize("field", ["min_keep_rows", "min_keep_cols", "min_per_layer"])
def test_floors_below_zero(field):
    with expect_refusal(field, "integer of 0 or more", "found -1"):
        plp.Global(**{field: -1})


def test_within_that_does_not_fit():
    scores = {"a": torch.rand(2, 3), "b": torch.rand(4)}
    with expect_refusal("a: mask (3, 2), parameter (2, 3)", "this architecture"):
        plp.Global()(scores, 0.5, MaskSet({"a": torch.ones(3, 2).bool()}))
    with expect_refusal("`within` to mask every scored parameter", "['b']"):
        plp.Global()(scores, 0.5, MaskSet({"a": torch.ones(2, 3).bool()}))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_layers_without_entries(allocation):
    assert allocation()({"none": torch.zeros(0)}, 0.5).counts() == {"none": (0, 0)}
    scores = {"none": torch.zeros(0, 3), "some": torch.rand(4)}
    assert allocation()(scores, 0.5).counts() == {"none": (0, 0), "some": (2, 4)}


def test_scores_of_two_precisions_compete_exactly():
    scores = {"single": torch.tensor([1.0, 0.0]), "double": torch.tensor([1 + 2**-52, 0.0], dtype=torch.float64)}
    assert kept_by(plp.Global()(scores, 0.75)) == [[], [0]]


def test_memory_layout_does_not_matter():
    plain = torch.randint(0, 4, (3, 4, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    allocation = plp.Layerwise(min_keep_rows=1, min_keep_cols=1)
    assert allocation({"w": plain.to(memory_format=torch.channels_last)}, 0.7) == allocation({"w": plain}, 0.7)
