"""IterSNIP and FORCE against loops written from their definition: a loop over rounds, samples and entries."""

from __future__ import annotations

import copy
import itertools
import math
from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from problems import PROBLEMS
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.core.iterate import iterate
from pl_prune.core.probe import Probe

PRUNABLE = {"mlp": ["0.weight", "2.weight"], "convnet": ["0.weight", "3.weight"]}
every_problem = pytest.mark.parametrize("kind", PROBLEMS)
ITERATIVE = [plp.IterSNIP, plp.FORCE]


def gradient(problem, names, kept):
    """Return dL/dw in the masked network, of all entries, by one backward pass for each sample."""
    model = copy.deepcopy(problem.model).double().eval()
    params = {n: p.detach() * kept[n] if n in kept else p.detach() for n, p in model.named_parameters()}
    leaves = {n: params[n].requires_grad_() for n in names}
    total = {n: torch.zeros_like(p) for n, p in leaves.items()}
    for x, y in zip(problem.x.double(), problem.y, strict=True):
        logits = torch.func.functional_call(model, {**params, **leaves}, (x.unsqueeze(0),))[0]
        loss = torch.logsumexp(logits, 0) - logits[y]
        for n, g in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total[n] += g / len(problem.x)
    return total


def rounds_of(kind, cls, sparsity, rounds):
    """Return the kept entries (layer, flat index) after each round."""
    problem = PROBLEMS[kind]()
    names = PRUNABLE[kind]
    dense = {n: problem.model.get_parameter(n).detach().double() for n in names}
    entries = [(n, i) for n in names for i in range(dense[n].numel())]
    alive, found = list(entries), []
    for e in range(1, rounds + 1):
        kept = {n: torch.zeros(w.numel(), dtype=torch.float64) for n, w in dense.items()}
        for n, i in alive:
            kept[n][i] = 1
        slope = gradient(problem, names, {n: k.view(dense[n].shape) for n, k in kept.items()})
        saliency = {n: (dense[n] * slope[n]).abs().flatten().tolist() for n in names}
        pool = entries if cls is plp.FORCE else alive
        removed = sparsity if e == rounds else 1 - (1 - sparsity) ** (e / rounds)
        budget = len(entries) - int((Decimal(repr(removed)) * len(entries)).to_integral_value(ROUND_HALF_UP))
        alive = sorted(pool, key=lambda entry: -saliency[entry[0]][entry[1]])[:budget]
        found.append(set(alive))
    return found


def recorded(kind, criterion, sparsity, allocation=None):
    """Run `iterate`; return the masks after each round and what sparsity each was asked for."""
    problem, seen, asked = PROBLEMS[kind](), [], []

    def note(scores, target, within):
        seen.append((allocation or plp.Global())(scores, target, within))
        asked.append(target)
        return seen[-1]

    params = plp.Select()(problem.model)
    before = {n: p.detach().clone() for n, p in params.items()}
    probe = Probe(problem.model.eval(), params, problem.loss, problem.batches(4, 3))
    masks, _ = iterate(criterion, probe, note, sparsity)
    assert masks == seen[-1]
    assert all(torch.equal(p, before[n]) for n, p in params.items())
    return seen, asked


def entries_of(masks):
    return {(n, i) for n, mask in masks.items() for i in mask.flatten().nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("cls", ITERATIVE)
@every_problem
@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 2), (0.8, 7), (0.9, 20)])
def test_every_round_keeps_what_the_definition_keeps(cls, kind, sparsity, rounds):
    seen, _ = recorded(kind, cls(rounds=rounds), sparsity)
    assert [entries_of(masks) for masks in seen] == rounds_of(kind, cls, sparsity, rounds)


@pytest.mark.parametrize("cls", ITERATIVE)
@every_problem
def test_one_round_is_snip(cls, kind):
    (once,), _ = recorded(kind, cls(rounds=1), 0.8)
    assert once == recorded(kind, plp.SNIP(), 0.8)[0][0]


@pytest.mark.parametrize("cls", ITERATIVE)
def test_densities_fall_by_one_factor(cls):
    seen, asked = recorded("mlp", cls(rounds=10), 0.9)
    kept = [1 - s for s in asked]
    assert asked[-1] == 0.9
    assert kept == pytest.approx([0.1 ** (e / 10) for e in range(1, 11)])
    total = sum(n for _, n in seen[0].counts().values())
    for masks, density in zip(seen, kept, strict=True):
        assert abs(sum(n for n, _ in masks.counts().values()) - density * total) <= 0.5 + 1e-9


def test_what_iterative_snip_prunes_stays_pruned_and_what_force_prunes_may_return():
    pruned, _ = recorded("mlp", plp.IterSNIP(rounds=20), 0.9)
    assert all(a.intersect(b) == b for a, b in itertools.pairwise(pruned))
    forced, _ = recorded("mlp", plp.FORCE(rounds=20), 0.9)
    back = [a.intersect(b) != b for a, b in itertools.pairwise(forced)]
    assert any(back)
    assert forced[-1] != pruned[-1]


def test_force_alone_scores_what_is_zero_now():
    problem = PROBLEMS["mlp"]()
    params = plp.Select()(problem.model)
    probe = Probe(problem.model.eval(), params, problem.loss, problem.batches(7))
    kept = math.ceil(sum(p.numel() for p in params.values()) * 0.2 ** (4 / 5))  # before the last round
    scored = {
        cls: sum(int(s.count_nonzero()) for s in iterate(cls(rounds=5), probe, plp.Global(), 0.8)[1].values())
        for cls in ITERATIVE
    }
    assert scored[plp.IterSNIP] <= kept < scored[plp.FORCE]


def test_pruned_entries_do_not_return_from_outside_the_masks_in_force():
    problem = PROBLEMS["mlp"]()
    params = plp.Select()(problem.model)
    within = plp.Layerwise()({n: torch.rand(p.shape) for n, p in params.items()}, 0.3)
    probe = Probe(problem.model.eval(), params, problem.loss, problem.batches(7))
    for cls in ITERATIVE:
        masks, _ = iterate(cls(rounds=6), probe, plp.Global(), 0.8, within)
        assert masks.intersect(within) == masks
        assert masks.sparsity() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("cls", ITERATIVE)
def test_rounds_are_counted(cls):
    with expect_refusal(f"{cls.__name__}.rounds to be a whole number", "found 0"):
        cls(rounds=0)
    assert cls(rounds=7).cost == "7 passes"
