from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core.probe import Probe
from pl_prune.criteria import yopo
from pl_prune.criteria.factorise import COPIES, EPSILON, divergence_of, factorise, svd_start

DIVERGENCES = ["frobenius", "kl", "itakura-saito"]
FITS = [("mu", kind) for kind in DIVERGENCES] + [("hals", "frobenius")]
INITS = ["uniform", "nndsvda", "svd"]
every_fit = pytest.mark.parametrize(("solver", "divergence"), FITS)
every_init = pytest.mark.parametrize("init", INITS)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05


def problem(n=1, o=6, d=9, r=3, seed=0):
    return uniform(n, o, d, seed=seed), uniform(n, r, o, seed=seed + 1), uniform(n, r, d, seed=seed + 2)


def scores_of(weights, **settings):
    """Score parameters of these values by YOPO."""
    params = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
    return plp.YOPO(**settings)(Probe(nn.Module(), params, None, []))


def weight(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def half_step(x, y, a, kind):
    """Update x of a = x y by the published formula, entry by entry; x is (o, r), y (r, d), a (o, d), lists of lists."""
    o, d, r = len(a), len(a[0]), len(y)
    fit = [[sum(x[i][k] * y[k][j] for k in range(r)) for j in range(d)] for i in range(o)]
    new = [[0.0] * r for _ in range(o)]
    for i, k in itertools.product(range(o), range(r)):
        if kind == "frobenius":
            above = sum(a[i][j] * y[k][j] for j in range(d))
            below = sum(fit[i][j] * y[k][j] for j in range(d))
            new[i][k] = x[i][k] * above / (below + EPSILON)
        elif kind == "kl":
            above = sum(a[i][j] / (fit[i][j] + EPSILON) * y[k][j] for j in range(d))
            new[i][k] = x[i][k] * above / (sum(y[k]) + EPSILON)
        else:
            above = sum(a[i][j] / (fit[i][j] + EPSILON) ** 2 * y[k][j] for j in range(d))
            below = sum(y[k][j] / (fit[i][j] + EPSILON) for j in range(d))
            new[i][k] = x[i][k] * math.sqrt(above / (below + EPSILON))
    return new


def transposed(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def multiplicative(a, v, h, iterations, kind="frobenius"):
    """The paper's updates: V first, then H with the new V."""
    a, v, h = a.tolist(), v.T.tolist(), h.tolist()
    for _ in range(iterations):
        v = half_step(v, h, a, kind)
        h = transposed(half_step(transposed(h), transposed(v), transposed(a), kind))
    return torch.tensor(v, dtype=torch.float64), torch.tensor(h, dtype=torch.float64)


def alternating(a, v, h, iterations):
    """HALS: each column of V, then each row of H, becomes its best non-negative value; three rounds of each."""
    v, h = v.T.clone(), h.clone()

    def best(x, y, a):
        for _ in range(3):
            for k in range(len(y)):
                rest = a - x @ y + x[:, k : k + 1] @ y[k : k + 1]
                x[:, k] = (rest @ y[k] / (y[k] @ y[k])).clamp(min=0)

    for _ in range(iterations):
        best(v, h, a)
        best(h.T, v.T, a.T)
    return v, h


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_multiplicative_updates_are_the_published_formulas(kind):
    a, v, h = problem(n=2)
    expected = [multiplicative(*one, 7, kind) for one in zip(a, v, h, strict=True)]
    factorise([a], v, h, 7, "mu", kind)
    for i, (expected_v, expected_h) in enumerate(expected):
        torch.testing.assert_close(v[i].T, expected_v, rtol=1e-12, atol=0)
        torch.testing.assert_close(h[i], expected_h, rtol=1e-12, atol=0)


def test_hals_is_coordinate_descent_by_rows():
    a, v, h = problem(n=2)
    expected = [alternating(*one, 4) for one in zip(a, v, h, strict=True)]
    factorise([a], v, h, 4, "hals")
    for i, (expected_v, expected_h) in enumerate(expected):
        torch.testing.assert_close(v[i].T, expected_v, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(h[i], expected_h, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("init", ["svd", "nndsvda"])
def test_scores_are_the_distance_from_the_fit_by_the_papers_formulas(init):
    w = weight(13, 3, 2, 2) * 3e-3
    a = w.abs().reshape(13, -1)
    scale = 2.0 ** math.frexp(float(a.mean()))[1]
    start = starts_of(a / scale, 3)[init]
    v, h = multiplicative(a / scale, *start, 20)
    expected = (a - scale * v @ h).abs().view_as(w)
    found = scores_of({"w": w}, rank=7, init=init, iterations=20)["w"]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def starts_of(a, rank):
    """Both starts from singular vectors, from numpy's decomposition, pair by pair; V is (r, o)."""
    u, sigma, vt = np.linalg.svd(a.numpy())
    spread = [np.sqrt(sigma[k]) * np.abs(x) for k in range(rank) for x in (u[:, k], vt[k])]
    pairs = []
    for k in range(rank):
        signed = [(np.maximum(s * u[:, k], 0), np.maximum(s * vt[k], 0)) for s in (1, -1)]
        x, y = max(signed, key=lambda p: np.linalg.norm(p[0]) * np.linalg.norm(p[1]))
        size = np.sqrt(sigma[k] * np.linalg.norm(x) * np.linalg.norm(y))
        for part in (x, y):
            part = size * part / np.linalg.norm(part)
            pairs.append(np.where(part < 1e-6, float(a.mean()), part))
    return {
        name: tuple(torch.tensor(np.stack(found[side::2])) for side in (0, 1))
        for name, found in (("svd", spread), ("nndsvda", pairs))
    }


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
@pytest.mark.parametrize("init", ["svd", "nndsvda"])
def test_starts_from_singular_vectors(init, shape):
    a = torch.stack([uniform(*shape, seed=seed) for seed in range(3)])
    found = svd_start(a, 3, spread=init == "svd")
    for i in range(3):
        for x, expected in zip(found, starts_of(a[i], 3)[init], strict=True):
            torch.testing.assert_close(x[i], expected, rtol=1e-8, atol=1e-10)


def test_nndsvda_is_that_of_scikit_learn():
    nmf = pytest.importorskip("sklearn.decomposition._nmf")
    a = uniform(9, 12)
    v, h = svd_start(a[None], 4, spread=False)
    expected = nmf._initialize_nmf(a.numpy(), 4, init="nndsvda", random_state=0)
    torch.testing.assert_close(v[0].T, torch.tensor(expected[0]), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(h[0], torch.tensor(expected[1]), rtol=1e-7, atol=1e-9)


def sklearn_fit(a, v, h, iterations, **settings):
    decomposition = pytest.importorskip("sklearn.decomposition")
    w, h, _ = decomposition.non_negative_factorization(
        a.numpy(), v.T.contiguous().numpy().copy(), h.numpy().copy(), n_components=len(h), init="custom", tol=0,
        max_iter=iterations, **settings,
    )  # fmt: skip
    return torch.tensor(w), torch.tensor(h)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_scikit_learns_multiplicative_updates_agree(kind):
    a, v, h = problem(o=12, d=20, r=4)
    loss = {"kl": "kullback-leibler"}.get(kind, kind)
    w, expected = sklearn_fit(a[0], v[0], h[0], 50, solver="mu", beta_loss=loss)
    factorise([a], v, h, 50, "mu", kind)
    torch.testing.assert_close(v[0].T, w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h[0], expected, rtol=1e-5, atol=1e-6)


def test_scikit_learns_coordinate_descent_ends_at_the_error_of_hals():
    a, v, h = problem(o=12, d=20, r=4)
    w, expected = sklearn_fit(a[0], v[0], h[0], 2000, solver="cd")
    factorise([a], v, h, 1000, "hals")
    ours, theirs = divergence_of(a, v, h, "frobenius"), divergence_of(a, w.T[None], expected[None], "frobenius")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@every_fit
def test_no_update_increases_the_divergence(solver, divergence):
    a, v, h = problem(n=3, o=10, d=14, r=3)
    seen = [divergence_of(a, v, h, divergence)]
    for _ in range(60):
        factorise([a], v, h, 1, solver, divergence)
        seen.append(divergence_of(a, v, h, divergence))
    levels = torch.stack(seen)
    assert (levels.diff(dim=0) <= 1e-6 * levels[:-1]).all()
    assert (levels[-1] < 0.9 * levels[0]).all()


def test_hals_ends_where_no_entry_can_improve():
    a, v, h = problem(n=2, o=10, d=14, r=3)
    factorise([a], v, h, 3000, "hals")
    residual = torch.bmm(v.mT, h) - a
    for x, gradient in ((v, torch.bmm(h, residual.mT)), (h, torch.bmm(v, residual))):
        assert (x >= 0).all()
        assert (x == 0).any()
        assert gradient[x > 0].abs().max() < 1e-6
        assert gradient[x == 0].min() > -1e-6


def test_hals_revives_a_row_whose_partner_is_zero():
    a, v, h = problem(o=10, d=14, r=3)
    h[:, 1] = 0
    kept = v[:, 1].clone()
    factorise([a], v, h, 1, "hals")
    assert torch.equal(v[:, 1], kept)
    assert h[:, 1].max() > 0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_divergence_against_its_definition(kind):
    a, v, h = problem(n=2)
    fit = torch.bmm(v.mT, h)
    terms = {
        "frobenius": (a - fit) ** 2 / 2,
        "kl": a * (a / fit).log() - a + fit,
        "itakura-saito": a / fit - (a / fit).log() - 1,
    }
    torch.testing.assert_close(divergence_of(a, v, h, kind), terms[kind].sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rank_0_is_magnitude(dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(5, 2)).to(dtype)
    ours, magnitude = plp.score(model, [plp.YOPO(rank=0), plp.Magnitude()])
    assert list(ours) == list(magnitude)
    for name in ours:
        assert ours[name].dtype == magnitude[name].dtype
        assert torch.equal(ours[name], magnitude[name])


@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (7,), (5, 1, 1)])
def test_a_layer_of_one_row_or_column_is_scored_by_magnitude(shape):
    w = weight(*shape)
    assert torch.equal(scores_of({"w": w, "other": weight(9, 9)})["w"], w.abs())


CAPS = [((2, 9), 1), ((9, 3), 1), ((7, 40), 1), ((8, 40), 2), ((16, 3, 3, 3), 4), ((28, 30), 7), ((64, 32), 7)]


@pytest.mark.parametrize(("shape", "rank"), CAPS)
def test_the_rank_is_at_most_a_quarter_of_the_shorter_side(shape, rank):
    w = {"w": weight(*shape)}
    found = scores_of(w, rank=7)["w"]
    assert torch.equal(found, scores_of(w, rank=rank)["w"])
    assert not torch.equal(found, scores_of(w, rank=rank - 1)["w"])
    assert found.max() > 0.1 * w["w"].abs().mean()


@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_a_layer_of_low_rank_leaves_nothing(solver):
    low = uniform(20, 2) @ uniform(2, 30, seed=1)
    scores = scores_of({"low": low, "full": weight(20, 30)}, rank=2, solver=solver, iterations=2000)
    assert scores["low"].max() < 2e-3 * low.mean()
    assert scores["full"].mean() > 0.1


def test_a_row_alone_is_fitted_exactly_by_rank_1():
    rows = uniform(5, 1, 20)  # the paper's per-channel variant
    v, h = uniform(5, 1, 1), uniform(5, 1, 20, seed=3)
    factorise([rows], v, h, 200)
    assert (rows - torch.bmm(v.mT, h)).abs().max() < 1e-6


@every_fit
@every_init
@pytest.mark.parametrize("more", [{}, {"per_filter": True}, {"tolerance": 1e-3}])
def test_a_layer_scaled_by_a_power_of_two_has_its_scores_scaled_bit_for_bit(solver, divergence, init, more):
    settings = {"solver": solver, "divergence": divergence, "init": init, "iterations": 30, **more}
    weights = {name: 0.02 * weight(16, 9, 3, seed=i, dtype=torch.float32) for i, name in enumerate("abc")}
    once = scores_of(weights, **settings)
    for power in (-12, 1, 5):
        scaled = scores_of({**weights, "b": weights["b"] * 2.0**power}, **settings)
        assert torch.equal(scaled["b"], once["b"] * 2.0**power)
        assert torch.equal(scaled["a"], once["a"])


@every_fit
@pytest.mark.parametrize("init", ["nndsvda", "svd"])
def test_permuted_rows_and_columns_have_permuted_scores(solver, divergence, init):
    w = weight(12, 20)
    rows, columns = torch.randperm(12), torch.randperm(20)
    settings = {"solver": solver, "divergence": divergence, "init": init, "rank": 3, "iterations": 20}
    found = scores_of({"w": w[rows][:, columns]}, **settings)["w"]
    torch.testing.assert_close(found, scores_of({"w": w}, **settings)["w"][rows][:, columns], rtol=1e-6, atol=1e-9)


@every_fit
def test_permuted_factors_give_a_permuted_fit(solver, divergence):
    a, v, h = problem(n=1, o=8, d=11, r=3)
    rows, columns = torch.randperm(8), torch.randperm(11)
    permuted = a[:, rows][:, :, columns].clone(), v[:, :, rows].clone(), h[:, :, columns].clone()
    factorise([a], v, h, 30, solver, divergence)
    factorise(permuted[:1], *permuted[1:], 30, solver, divergence)
    torch.testing.assert_close(permuted[1], v[:, :, rows], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(permuted[2], h[:, :, columns], rtol=1e-9, atol=1e-12)


@every_fit
@every_init
def test_rows_and_columns_of_zeros(solver, divergence, init):
    w = weight(12, 16, dtype=torch.float32)
    w[3], w[:, 5], w[7, 2] = 0, 0, 0
    found = scores_of({"w": w, "zeros": torch.zeros(12, 16)}, solver=solver, divergence=divergence, init=init)
    assert found["w"].isfinite().all()
    assert found["w"][3].max() == found["w"][:, 5].max() == 0
    assert found["w"][w != 0].mean() > 0.1
    assert found["zeros"].abs().max() == 0


@every_fit
@every_init
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_what_else_is_scored_does_not_matter(solver, divergence, init, tolerance):
    settings = {"solver": solver, "divergence": divergence, "init": init, "tolerance": tolerance, "iterations": 40}
    shapes = [(16, 12, 3), (40, 9), (16, 12, 3), (12, 31), (9, 5), (16, 12, 3), (33, 70), (28, 28), (6, 200)]
    weights = {f"l{i}": weight(*s, seed=i, dtype=torch.float32) for i, s in enumerate(shapes)} | {"big": weight(64, 65)}
    together = scores_of(weights, **settings)
    for name in weights:
        torch.testing.assert_close(scores_of({name: weights[name]}, **settings)[name], together[name], rtol=0, atol=0)


def test_uniform_draws_go_by_seed_and_name():
    w = weight(20, 30)
    names = {"a": w, "b": w}
    first, again, other = scores_of(names), scores_of(names), scores_of(names, seed=1)
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], other["a"])
    assert torch.equal(first["a"], scores_of({"_orig_mod.a": w})["_orig_mod.a"])
    for init in ("svd", "nndsvda"):
        drawn = scores_of(names, init=init), scores_of(names, init=init, seed=1)
        assert torch.equal(drawn[0]["a"], drawn[0]["b"])
        assert torch.equal(drawn[0]["a"], drawn[1]["a"])


def test_masks_depend_on_the_seed_of_the_fit_and_those_from_singular_vectors_do_not():
    model = nn.Sequential(nn.Linear(80, 60), nn.ReLU(), nn.Linear(60, 10))
    for init, same in (("uniform", False), ("svd", True)):
        masks = [plp.Global()(plp.score(model, plp.YOPO(init=init, seed=seed)), 0.9) for seed in (0, 1)]
        assert (masks[0] == masks[1]) is same


def test_a_layers_filters_are_fitted_one_by_one():
    w = weight(6, 12, 3, 3)
    found = scores_of({"w": w}, per_filter=True, init="svd")["w"]
    for i in range(6):
        alone = scores_of({"w": w[i].view(12, 9)}, init="svd")["w"]
        torch.testing.assert_close(found[i], alone.view(12, 3, 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 20), (12, 20, 1, 1), (12, 1, 3, 3)])
def test_filters_without_a_matrix_are_fitted_with_their_layer(shape):
    w = {"w": weight(*shape)}
    assert torch.equal(scores_of(w, per_filter=True)["w"], scores_of(w)["w"])


def test_normalised_scores_are_counted_in_medians_of_the_weights():
    w = weight(21, 31)
    plain, found = scores_of({"w": w})["w"], scores_of({"w": w}, normalize=True)["w"]
    torch.testing.assert_close(found, plain / np.median(w.abs().numpy()), rtol=1e-12, atol=0)
    assert torch.equal(scores_of({"w": 8 * w}, normalize=True)["w"], found)
    sparse = w * (weight(21, 31, seed=1) > 1)
    mostly = scores_of({"w": sparse}, normalize=True)["w"]
    torch.testing.assert_close(mostly, scores_of({"w": sparse})["w"] / sparse.abs().mean(), rtol=1e-12, atol=0)


@every_fit
def test_a_matrix_is_finished_when_it_hardly_improves(solver, divergence):
    tolerance = 0.02
    a, *start = problem(n=5, o=20, d=30, r=3)
    v, h = (x.clone() for x in start)
    factorise([a], v, h, 500, solver, divergence, tolerance)
    ends = []
    for i in range(5):
        one, x, y = a[i : i + 1], start[0][i : i + 1].clone(), start[1][i : i + 1].clone()
        before, now, done = None, divergence_of(one, x, y, divergence), 0
        while before is None or before - now > tolerance * before:
            factorise([one], x, y, 10, solver, divergence)
            before, now, done = now, divergence_of(one, x, y, divergence), done + 10
        torch.testing.assert_close(v[i : i + 1], x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(h[i : i + 1], y, rtol=1e-10, atol=1e-12)
        ends.append(done)
    assert max(ends) < 500


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_portions_hold_three_copies_of_the_largest_layer_at_most(divergence, monkeypatch):
    held, together = [], []

    def watched(matrices, v, h, *rest):
        held.append(3 * (v.numel() + h.numel()) + COPIES[divergence] * max(a.numel() for a in matrices))
        together.append(len(matrices))
        factorise(matrices, v, h, *rest)

    monkeypatch.setattr(yopo, "factorise", watched)
    large = {f"l{i}": weight(130, 150, seed=i) for i in range(9)}
    weights = {**large, **{f"s{i}": weight(8, 6 + i, seed=i) for i in range(9)}}
    scores_of(weights, divergence=divergence, iterations=1, rank=3)
    assert max(held) <= 3 * 130 * 150
    assert sum(together) == 18
    assert len(together) < 9
    monkeypatch.setattr(yopo, "SMALL", 130 * 150 - 1)
    together.clear()
    scores_of(weights, divergence=divergence, iterations=1, rank=3)
    assert together.count(1) == 9


FLOORS = {"min_keep_rows": 1, "min_keep_cols": 1}


@pytest.mark.parametrize("allocation", [plp.Global(), plp.Layerwise(), plp.Robust(), plp.Robust(**FLOORS)])
def test_one_set_of_scores_gives_nested_masks(allocation):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 10))
    scores = plp.score(model, plp.YOPO(iterations=20))
    masks = [allocation(scores, s) for s in (0.0, 0.5, 0.6838, 0.8, 0.9)]
    for denser, sparser in itertools.pairwise(masks):
        assert denser.intersect(sparser) == sparser


def test_small_layers_run_on_one_thread_and_the_number_is_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        scores_of({"w": weight(20, 20)}, iterations=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [-1, 2.5, True, "7"])
def test_a_rank_that_is_none(rank):
    with expect_refusal("YOPO.rank", "whole number of 0 or more", f"found {rank!r}"):
        plp.YOPO(rank=rank)


def test_a_rank_above_the_sides_of_every_layer():
    weights = {"a": weight(4, 9), "b": weight(10, 3)}
    assert scores_of(weights, rank=10)["b"].isfinite().all()
    with expect_refusal("YOPO.rank", "found 11", "longest side is 10", "Lower the rank"):
        scores_of(weights, rank=11)


@pytest.mark.parametrize("value", [-0.1, True, "1", float("nan")])
def test_a_tolerance_that_is_none(value):
    with expect_refusal("YOPO.tolerance", "0 or more", f"found {value!r}"):
        plp.YOPO(tolerance=value)


def test_settings_that_cannot_be():
    with expect_refusal("YOPO.iterations", "1 or more", "found 0"):
        plp.YOPO(iterations=0)
    with expect_refusal("solver 'mu'", "divergence='kl'", "found 'hals'"):
        plp.YOPO(solver="hals", divergence="kl")
    with expect_refusal("YOPO.init", "'nndsvda'", "found 'random'"):
        plp.YOPO(init="random")


@every_init
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_their_layer(init, bad):
    weights = {name: weight(6, 8) for name in ("first", "second")}
    weights["second"][2, 3] = bad
    with expect_refusal("finite weights", "in second"):
        scores_of(weights, init=init)
