"""Figures of scores and magnitudes: their numbers, and the sentences below them."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import pl_prune as plp
from pl_prune.report.entries import entries
from pl_prune.report.magnitudes import pruned_figure, scatter_figure
from pl_prune.report.saliency import correlation_figure, counts, decades, edges, saliency_figure

WEIGHTS = {"a": (40, 30), "b": (10, 20)}


def row(name, scores, allocation=None, sparsity=0.9):
    return entries(name, scores, (allocation or plp.Global())(scores, sparsity))


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(shape, generator=generator).abs() for n, shape in WEIGHTS.items()}
    noise = {n: torch.rand(shape, generator=generator) + 0.1 for n, shape in WEIGHTS.items()}
    return {
        "magnitude": row("magnitude", weights),
        "inverse": row("inverse", {n: 1 / w for n, w in weights.items()}),
        "noise": row("noise", noise),
        "signed": row("signed", {n: w - 1 for n, w in weights.items()}),
        "layers": row("layers", noise, plp.Layerwise()),
    }


def drawn(picture):
    assert picture.png.startswith(b"\x89PNG")
    assert picture.svg.startswith("<svg")
    assert "mathdefault" not in picture.svg
    return picture.caption


@pytest.mark.parametrize("signed", [False, True])
def test_bins_hold_every_value(signed):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    values = values if signed else values.abs()
    ends, flat = edges(values)
    assert (flat is not None) == signed
    assert ends == sorted(ends)
    assert len(ends) == 61
    found = counts(values, ends)
    for i in range(1, 59):
        assert found[i] == sum(ends[i] <= v < ends[i + 1] for v in values.tolist())
    assert sum(found) == 5000


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, 2.0], [1e-30, 1e30], [-1.0, -1.0], [0.0, -1e-9]])
def test_odd_scores_are_drawn(values):
    scores = {"a": torch.tensor(values, dtype=torch.float64)}
    one = entries("odd", scores, {"a": torch.tensor([True, False])})
    ends, _ = edges(one.scores)
    assert all(a < b for a, b in itertools.pairwise(ends))
    assert "mathdefault" not in drawn(saliency_figure([one]))


def test_decades_lie_between_percentiles():
    assert decades(10.0 ** torch.linspace(0, 10, 1001, dtype=torch.float64)) == pytest.approx(9)
    assert decades(torch.zeros(3)) == 0


def test_histograms_name_widest_and_narrowest_and_who_has_no_threshold(rows):
    caption = drawn(saliency_figure(list(rows.values())))
    wide = {name: decades(one.scores) for name, one in rows.items()}
    first, last = max(wide, key=wide.get), min(wide, key=wide.get)
    assert f"Scores of {first} span {wide[first]:.1f} decades" in caption
    assert f"those of {last} {wide[last]:.1f}" in caption
    assert "but for layers, where no single threshold" in caption
    assert "but for" not in saliency_figure([rows["noise"]]).caption
    assert "layers have their own" in saliency_figure([rows["layers"]]).caption
    assert saliency_figure([]) is None


def test_the_correlation_of_a_criterion_with_its_inverse_is_minus_one(rows):
    picture = correlation_figure([rows["magnitude"], rows["inverse"], rows["noise"]])
    assert "magnitude and inverse least (-1.00)" in drawn(picture)
    assert "-1.00" in picture.svg
    assert correlation_figure([rows["noise"]]) is None


def test_kept_entries_below_the_magnitude_threshold_are_counted(rows):
    caption = drawn(scatter_figure(list(rows.values()), rows["magnitude"]))
    sizes = rows["magnitude"].scores
    line = sizes.sort().values[round(0.9 * len(sizes))]
    for name in ("inverse", "noise", "signed"):
        kept = sizes[rows[name].kept]
        share = 100 * sum(v < line for v in kept) / len(kept)
        assert f"{name} {share:.3g} %" in caption
    assert "inverse 100 %" in caption
    assert "signed 0 %" in caption
    assert "magnitude 0 %" not in caption
    other = entries("other", {"c": torch.rand(5)}, {"c": torch.rand(5) > 0.5})
    assert scatter_figure([other], rows["magnitude"]) is None


def test_mean_magnitudes_of_what_is_pruned(rows):
    caption = drawn(pruned_figure(list(rows.values()), rows["magnitude"]))
    sizes = rows["magnitude"].scores
    for name, one in rows.items():
        gone = [v for v, kept in zip(sizes.tolist(), one.kept.tolist(), strict=True) if not kept]
        assert re.search(rf"\b{name} {sum(gone) / len(gone):.3g}\b", caption)
    assert f"of all entries it is {float(sizes.mean()):.3g}" in caption
