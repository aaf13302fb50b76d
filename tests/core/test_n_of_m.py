"""NofM against a loop over groups, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import expect_refusal

import pl_prune as plp
from pl_prune import MaskSet

FAST = settings(max_examples=60, deadline=None, derandomize=True)
PATTERNS = [(2, 4), (1, 4), (1, 2), (4, 8), (2, 3)]
SHAPES = [(3, 8), (5, 16), (2, 6), (4, 3), (4, 7, 3, 3), (2, 8, 2), (6, 1, 3, 3), (9,), (0, 4), (4, 0)]


def groups_of(shape, m):
    """List the flat indices of every m consecutive entries along the input dimension."""
    places = list(itertools.product(*map(range, shape)))
    flat = {place: i for i, place in enumerate(places)}
    dim = min(1, len(shape) - 1)
    rows = {}
    for place in places:
        rows.setdefault((*place[:dim], *place[dim + 1 :]), []).append(flat[place])
    return [row[start : start + m] for row in rows.values() for start in range(0, len(row), m)]


def oracle(scores, n, m, within=None):
    """Return the kept flat indices: in each group the n best of the pool, ties to the lower index."""
    kept = {}
    for name, score in scores.items():
        values = score.flatten().tolist()
        inside = [True] * len(values) if within is None else within[name].flatten().tolist()
        best = [
            sorted((i for i in g if inside[i]), key=lambda i: (-values[i], i))[:n] for g in groups_of(score.shape, m)
        ]
        kept[name] = sorted(itertools.chain.from_iterable(best))
    return kept


def kept_by(masks):
    return {name: mask.flatten().nonzero()[:, 0].tolist() for name, mask in masks.items()}


@st.composite
def problems(draw):
    n, m = draw(st.sampled_from(PATTERNS))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    torch.manual_seed(draw(st.integers(0, 9)))
    ties = draw(st.booleans())
    scores = {f"l{i}": torch.randint(-1, 2, s).float() if ties else torch.randn(s) for i, s in enumerate(shapes)}
    return n, m, scores


@FAST
@given(problems())
def test_each_group_keeps_its_best(problem):
    n, m, scores = problem
    before = {name: score.clone() for name, score in scores.items()}
    masks = plp.NofM(n, m)(scores, 1 - n / m)
    assert kept_by(masks) == oracle(scores, n, m)
    assert masks.shapes() == {name: tuple(s.shape) for name, s in scores.items()}
    assert all(torch.equal(score, before[name]) for name, score in scores.items())
    for name, mask in masks.items():  # the pattern, entry by entry
        flat = mask.flatten().tolist()
        assert all(sum(flat[i] for i in group) == min(n, len(group)) for group in groups_of(scores[name].shape, m))


@FAST
@given(problems(), st.randoms(use_true_random=False))
def test_each_group_keeps_the_best_of_what_is_within(problem, dice):
    n, m, scores = problem
    within = MaskSet({
        name: torch.tensor([dice.random() < 0.6 for _ in range(s.numel())]).bool().view(s.shape)
        for name, s in scores.items()
    })
    masks = plp.NofM(n, m)(scores, 1 - n / m, within)
    assert kept_by(masks) == oracle(scores, n, m, within)
    whole = plp.NofM(n, m)(scores, 1 - n / m)
    assert plp.NofM(n, m)(scores, 1 - n / m, whole) == whole


def test_two_of_four_is_what_sparse_tensor_cores_take():
    masks = plp.NofM()({"fc": torch.rand(6, 32), "conv": torch.rand(5, 16, 3, 3)}, 0.5)
    assert masks.counts() == {"fc": (96, 192), "conv": (360, 720)}
    rows = [masks["fc"], masks["conv"].permute(2, 3, 0, 1).reshape(-1, 16)]  # channels last, as in NVIDIA's kernels
    for row in rows:
        assert (row.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_the_last_group_may_be_shorter():
    scores = {"w": torch.tensor([[1.0, 2, 3, 4, 5, 6, 7]]), "first": torch.rand(4, 3, 3, 3), "narrow": torch.rand(5, 2)}
    masks = plp.NofM(2, 4)(scores, 0.5)
    assert masks["w"].tolist() == [[False, False, True, True, False, True, True]]
    assert masks.counts() == {"w": (4, 7), "first": (72, 108), "narrow": (10, 10)}


@pytest.mark.parametrize("sparsity", [0.5, 0.312, 0.3116, 0.4])
def test_the_nominal_sparsity_and_what_short_groups_make_of_it_are_both_right(sparsity):
    scores = {"w": torch.rand(1, 7), "first": torch.rand(4, 3, 3, 3), "narrow": torch.rand(5, 2)}
    assert plp.NofM()(scores, sparsity).sparsity() == pytest.approx(39 / 125)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.51, 0.9])
def test_another_sparsity_is_refused(sparsity):
    scores = {"w": torch.rand(1, 7), "first": torch.rand(4, 3, 3, 3), "narrow": torch.rand(5, 2)}
    with expect_refusal("a sparsity of 0.5", "2 of 4 gives (0.312 here", f"found {sparsity}", "several rounds"):
        plp.NofM()(scores, sparsity)


def test_a_sparsity_with_three_decimals_is_enough():
    assert plp.NofM(1, 3)({"w": torch.rand(5, 30)}, 0.667).counts() == {"w": (50, 150)}
    with expect_refusal("a sparsity of 0.6667", "found 0.66."):
        plp.NofM(1, 3)({"w": torch.rand(5, 30)}, 0.66)
    with expect_refusal("sparsity in [0, 1)"):
        plp.NofM()({"w": torch.rand(5, 30)}, 1.0)


def test_floors_choose_first_within_their_group():
    scores = {"w": torch.tensor([[3.0, 3, 1, 0], [3.0, 3, 0, 1], [9.0, 9, 0, 0]])}
    assert plp.NofM(min_keep_rows=2, min_per_layer=3)(scores, 0.5)["w"].tolist() == [[True, True, False, False]] * 3
    masks = plp.NofM(min_keep_cols=1)(scores, 0.5)
    assert masks["w"].tolist() == [[True, False, True, False], [True, False, False, True], [True, True, False, False]]


def test_floors_that_ask_for_more_than_a_group_has():
    scores = {"w": torch.tensor([[9.0, 9, 9, 0], [1.0, 1, 1, 0]])}
    with expect_refusal(
        "the floors to ask for at most 2 of every 4", "a group of which they ask for 4", "Lower the floors"
    ):
        plp.NofM(min_keep_cols=1)(scores, 0.5)
    with expect_refusal("min_keep_rows=3", "into the 4 of 8"):
        plp.NofM(min_keep_rows=3)(scores, 0.5)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_go_by_index(value, dtype):
    masks = plp.NofM()({"w": torch.full((2, 8), value, dtype=dtype)}, 0.5)
    assert masks["w"].tolist() == [[True, True, False, False] * 2] * 2


def test_scores_that_are_not_finite():
    with expect_refusal("NaN or infinity in w."):
        plp.NofM()({"w": torch.tensor([[1.0, float("nan"), 0, 0]])}, 0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"n": 0}, "n to be a whole number"), ({"m": 2.5}, "m to be a whole number"), ({"n": 4}, "n=4 of m=4")],
)
def test_patterns_that_are_none(settings, said):
    with expect_refusal(said):
        plp.NofM(**settings)


def test_criteria_of_several_rounds_ask_for_sparsities_on_the_way():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    from pl_prune.core.iterate import iterate
    from pl_prune.core.probe import Probe

    probe = Probe(model, {"0.weight": model[0].weight}, lambda m, b: m(b[0]).square().mean(), [(torch.ones(3, 8),)])
    with expect_refusal("criteria of several rounds"):
        iterate(plp.IterSNIP(rounds=3), probe, plp.NofM(), 0.5)
    masks, _ = iterate(plp.SNIP(), probe, plp.NofM(), 0.5)
    assert masks.sparsity() == 0.5
