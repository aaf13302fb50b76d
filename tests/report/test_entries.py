"""What figures take of scores and masks, against loops."""

from __future__ import annotations

from math import isnan

import pytest
import torch

import pl_prune as plp
from pl_prune.report.entries import entries, rank_correlations, ranks


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spearman(a, b):
    """Ranks by counting, then Pearson's formula, in a loop."""

    def rank(values):
        return [sum(u < v for u in values) + (sum(u == v for u in values) - 1) / 2 for v in values]

    x, y = rank(a), rank(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return cov / (sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y)) ** 0.5


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_rank_correlation_by_counting(digits):
    found = [
        {"a": (numbers(3, 5, seed=s) * 10**digits).round() / 10**digits, "b": (numbers(7, seed=s + 9) * 2).round()}
        for s in range(3)
    ]
    keep = {"a": torch.ones(3, 5).bool(), "b": torch.ones(7).bool()}
    table = rank_correlations([entries(str(i), scores, keep) for i, scores in enumerate(found)])
    flat = [torch.cat([scores["a"].flatten(), scores["b"]]).tolist() for scores in found]
    for i in range(3):
        for j in range(3):
            assert table[i][j] == pytest.approx(spearman(flat[i], flat[j]), abs=1e-12)


def test_what_cannot_be_correlated_is_nan():
    keep = {"a": torch.ones(4).bool()}
    constant = entries("constant", {"a": torch.ones(4)}, keep)
    other = entries("other", {"a": torch.arange(4.0)}, keep)
    larger = entries("larger", {"a": torch.arange(5.0)}, {"a": torch.ones(5).bool()})
    table = rank_correlations([constant, other, larger])
    assert [[isnan(v) for v in line] for line in table] == [
        [True, True, True],
        [True, False, True],
        [True, True, False],
    ]


def test_ranks_of_ties_are_shared():
    assert ranks(torch.tensor([2.0, 1.0, 2.0, 2.0])).tolist() == [2.0, 0.0, 2.0, 2.0]


def test_a_small_network_is_taken_whole_in_the_order_of_names():
    scores = {"b": numbers(2, 3), "a": numbers(4, seed=1), "unmasked": numbers(2)}
    masks = {"a": scores["a"] > 0, "b": scores["b"] > 0}
    found = entries("row", scores, masks, weights="abc")
    assert found.shapes == {"a": (4,), "b": (2, 3)}
    assert torch.equal(found.scores, torch.cat([scores["a"], scores["b"].flatten()]).double())
    assert torch.equal(found.kept, found.scores > 0)
    assert (found.row, found.weights, found.total) == ("row", "abc", 10)


def test_a_large_network_is_sampled_at_places_that_runs_share():
    keep = {"a": torch.arange(3000) % 3 == 0, "b": torch.zeros(50, 100).bool()}
    places = {"a": torch.arange(3000.0), "b": torch.arange(3000.0, 8000.0).view(50, 100)}
    one = entries("one", places, keep, sample=500)
    other = entries("other", {name: -p for name, p in places.items()}, keep, sample=500)
    assert 400 < len(one.scores) <= 500
    assert one.total == 8000
    assert torch.equal(one.scores, -other.scores)
    assert torch.equal(one.kept, (one.scores < 3000) & (one.scores % 3 == 0))
    assert 0.3 < float((one.scores < 3000).double().mean()) < 0.45
    assert len({int(place) % 9 for place in one.scores}) == 9


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_the_threshold_is_the_lowest_kept_score_of_all_entries(sparsity):
    scores = {"a": numbers(40, 30).abs(), "b": 5 * numbers(20, 10, seed=1).abs()}
    masks = plp.Global()(scores, sparsity)
    flat = torch.cat([s.flatten() for s in scores.values()]).sort().values
    found = entries("row", scores, masks, sample=50)
    assert found.threshold == flat[round(sparsity * len(flat))]
    assert entries("row", scores, plp.Layerwise()(scores, sparsity)).threshold is None


@pytest.mark.parametrize("keep", [True, False])
def test_there_is_no_threshold_where_all_or_nothing_is_kept(keep):
    assert entries("row", {"a": numbers(5)}, {"a": torch.full((5,), keep)}).threshold is None


def test_scores_and_masks_that_do_not_belong_together_are_refused():
    with pytest.raises(plp.PruneError, match=r"scores \(3,\) and a mask \(4,\) of 'a'.*Run the fit again"):
        entries("row", {"a": numbers(3)}, {"a": numbers(4) > 0})
    with pytest.raises(plp.PruneError, match="found none"):
        entries("row", {"a": numbers(3)}, {"b": numbers(3) > 0})
