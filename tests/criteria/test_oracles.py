"""Each criterion against a brute-force formula in double precision that shares no code with it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from problems import CUTS, PROBLEMS
from torch import nn

import pl_prune as plp

PRUNABLE = {"mlp": ["0.weight", "2.weight"], "convnet": ["0.weight", "3.weight"]}


def log_loss(logits, label):
    """Cross-entropy of one sample, from its definition."""
    return torch.logsumexp(logits, 0) - logits[label]


def sensitivity_to_a_mask(problem, names):
    """Return |dL/dc| at c = 1 for an explicit mask c on every weight, by one backward pass for each sample."""
    model = copy.deepcopy(problem.model).double().eval()
    masks = {name: torch.ones_like(p, requires_grad=True) for name, p in model.named_parameters() if name in names}
    for x, y in zip(problem.x.double(), problem.y, strict=True):
        masked = {n: p.detach() * masks[n] if n in masks else p.detach() for n, p in model.named_parameters()}
        logits = torch.func.functional_call(model, masked, (x.unsqueeze(0),))[0]
        (log_loss(logits, y) / len(problem.x)).backward()
    return {name: mask.grad.abs() for name, mask in masks.items()}


def slope_of_the_mean_loss(problem, names):
    """Return |dL/dw| by central differences, entry by entry."""
    model = copy.deepcopy(problem.model).double().eval()

    @torch.no_grad()
    def mean_loss():
        return (
            math.fsum(float(log_loss(*sample)) for sample in zip(model(problem.x.double()), problem.y, strict=True)) / 7
        )

    slopes, step = {}, 1e-5
    for name in names:
        weight = model.get_parameter(name).data.view(-1)
        slope = torch.zeros_like(weight)
        for i in range(len(weight)):
            w = weight[i].item()
            weight[i] = w + step
            above = mean_loss()
            weight[i] = w - step
            slope[i] = abs(above - mean_loss()) / (2 * step)
            weight[i] = w
        slopes[name] = slope.view(model.get_parameter(name).shape)
    return slopes


def magnitude(problem, names):
    params = dict(problem.model.named_parameters())
    return {
        name: torch.tensor([math.fabs(w) for w in params[name].reshape(-1).tolist()], dtype=torch.float64).view(
            params[name].shape
        )
        for name in names
    }


ORACLES = {
    plp.SNIP: (sensitivity_to_a_mask, 1e-12),
    plp.GradNorm: (slope_of_the_mean_loss, 1e-8),
    plp.Magnitude: (magnitude, 0.0),
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("criterion", ORACLES, ids=lambda c: c.__name__)
def test_double_precision(criterion, kind):
    problem = PROBLEMS[kind]()
    oracle, tolerance = ORACLES[criterion]
    expected = oracle(problem, PRUNABLE[kind])
    for cut in CUTS:
        scores = plp.score(problem.model, criterion(), problem.batches(*cut), problem.loss)
        assert list(scores) == PRUNABLE[kind]
        for name, score in scores.items():
            assert score.dtype == torch.float64
            assert expected[name].count_nonzero() > expected[name].numel() / 2
            torch.testing.assert_close(score, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("criterion", ORACLES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_gives_single_precision_scores(criterion, kind, dtype):
    problem = PROBLEMS[kind](dtype)
    expected = ORACLES[criterion][0](problem, PRUNABLE[kind])
    scores = plp.score(problem.model, criterion(), problem.batches(3, 3, 1), problem.loss)
    for name, score in scores.items():
        assert score.dtype == torch.float32
        error = (score - expected[name]).abs().max() / expected[name].abs().max()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype], name


@pytest.mark.parametrize("criterion", [plp.SNIP, plp.GradNorm])
def test_a_short_last_batch_weighs_by_its_samples(criterion):
    problem = PROBLEMS["mlp"]()
    of_batches = [plp.score(problem.model, criterion(), [b], problem.loss)["0.weight"] for b in problem.batches(6, 1)]
    both = plp.score(problem.model, criterion(), problem.batches(6, 1), problem.loss)["0.weight"]
    assert (both - sum(of_batches) / 2).abs().max() > 0.01 * both.abs().max()
    expected = ORACLES[criterion][0](problem, ["0.weight"])["0.weight"]
    torch.testing.assert_close(both, expected, rtol=1e-7, atol=1e-7)


def test_the_absolute_value_comes_after_the_mean():
    problem = PROBLEMS["mlp"]()
    mean = plp.score(problem.model, plp.GradNorm(), problem.batches(7), problem.loss)["0.weight"]
    singles = [
        plp.score(problem.model, plp.GradNorm(), [b], problem.loss)["0.weight"] for b in problem.batches(*[1] * 7)
    ]
    assert (mean <= sum(singles) / 7 + 1e-12).all()
    assert (mean < sum(singles) / 7 * 0.9).any()


def test_snip_is_the_weight_times_its_gradient():
    problem = PROBLEMS["convnet"]()
    snip, slope = (plp.score(problem.model, c, problem.batches(7), problem.loss) for c in (plp.SNIP(), plp.GradNorm()))
    for name in PRUNABLE["convnet"]:
        weight = problem.model.get_parameter(name).detach()
        torch.testing.assert_close(snip[name], weight.abs() * slope[name], rtol=1e-12, atol=0)


def test_snip_of_weights_that_are_zero_or_passed_by_is_zero():
    problem = PROBLEMS["mlp"]()
    with torch.no_grad():
        problem.model[0].weight[2] = 0
        problem.model[2].weight[:, 3] = 0
    scores = plp.score(problem.model, plp.SNIP(), problem.batches(7), problem.loss)
    assert scores["0.weight"][[2, 3]].count_nonzero() == 0
    assert scores["0.weight"].count_nonzero() > 0


def test_batch_norm_uses_what_it_has_seen_and_dropout_nothing():
    problem = PROBLEMS["convnet"]()
    problem.model.train()
    trained = plp.score(problem.model, plp.SNIP(), problem.batches(7), problem.loss)
    problem.model[1].running_mean += 1
    moved = plp.score(problem.model, plp.SNIP(), problem.batches(7), problem.loss)
    torch.testing.assert_close(trained, sensitivity_to_a_mask(PROBLEMS["convnet"](), PRUNABLE["convnet"]))
    assert not torch.allclose(moved["0.weight"], trained["0.weight"])


@pytest.mark.parametrize("criterion", [plp.SNIP(), plp.GradNorm(), plp.Magnitude()], ids=lambda c: type(c).__name__)
def test_tied_weights_are_scored_once_by_their_joint_gradient(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)), nn.Linear(4, 3)).double()
    model[1].weight = model[0].weight
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    scores = plp.score(model, criterion, [(x, y)], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    mask = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
    weight = model[0].weight.detach()
    logits = nn.functional.linear(x @ (weight * mask).T @ (weight * mask).T, model[2].weight, model[2].bias)
    (by_mask,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y), mask)
    expected = {"SNIP": by_mask, "GradNorm": by_mask / weight, "Magnitude": weight}[type(criterion).__name__].abs()
    assert list(scores) == ["0.weight"]
    torch.testing.assert_close(scores["0.weight"], expected.detach())


def wide():
    return nn.Sequential(nn.Linear(100, 80), nn.Linear(80, 100), nn.Linear(100, 2))


def test_random_scores_are_uniform_and_independent():
    scores = plp.score(wide(), plp.Random())
    for score in scores.values():
        ordered = score.double().flatten().sort().values
        grid = torch.arange(1, 8001, dtype=torch.float64) / 8000
        assert ordered[0] >= 0
        assert ordered[-1] < 1
        assert (ordered - grid).abs().max() < 1.95 / math.sqrt(8000)  # Kolmogorov-Smirnov, p = 0.001
    first, second = (score.double().flatten() for score in scores.values())
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.05
    assert torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1].abs() < 0.05


def test_random_scores_depend_on_the_seed_alone():
    def draw(seed, outside, dtype=torch.float32):
        torch.manual_seed(outside)
        return plp.score(wide().to(dtype), plp.Random(seed))

    first = draw(0, outside=1)
    for same in (draw(0, outside=2), draw(0, outside=2, dtype=torch.float64), draw(0, 1, torch.bfloat16)):
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert all(score.dtype == torch.float32 for score in same.values())
    other = draw(1, outside=1)
    assert all(not torch.equal(first[name], other[name]) for name in first)


def test_random_masks_prune_every_layer_alike():
    counts = plp.Global()(plp.score(wide(), plp.Random()), 0.9).counts()
    assert sum(kept for kept, _ in counts.values()) == 1600
    for kept, _ in counts.values():
        assert abs(kept - 800) < 4 * math.sqrt(8000 * 0.1 * 0.9)


def test_criteria_rank_differently():
    problem = PROBLEMS["convnet"]()
    masks = [
        plp.Global()(plp.score(problem.model, c, problem.batches(7), problem.loss), 0.5)
        for c in (plp.SNIP(), plp.GradNorm(), plp.Magnitude(), plp.Random())
    ]
    assert len(set(masks)) == 4


def test_random_scores_have_nothing_to_do_with_weights_drawn_under_the_same_seed():
    for seed in (0, 1, 42):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40), nn.Linear(40, 2))
        scores = plp.score(model, plp.Random(seed))
        for name, score in scores.items():
            pair = torch.stack([score.flatten(), model.get_parameter(name).detach().flatten()])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.1, (seed, name)
