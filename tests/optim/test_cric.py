"""CRIC against its procedure written as loops over units, in double precision."""

from __future__ import annotations

import pytest
import torch
from fingerprint import fingerprint
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.optim.cric import Cycle


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0])[:, 0], batch[1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(count, 12, 4, generator=generator, dtype=torch.float64)
    return [(x, x.sum(1)) for x in data]


def lowest(scores, sizes, count, min_keep=1):
    """Walk up the scores, and pass over layers that are down to min_keep."""
    left, chosen = list(sizes), []
    owner = [layer for layer, size in enumerate(sizes) for _ in range(size)]
    for i in sorted(range(len(scores)), key=lambda i: (scores[i], i)):
        if len(chosen) < count and left[owner[i]] > min_keep:
            chosen.append(i)
            left[owner[i]] -= 1
    return set(chosen)


def by_hand(count, steps, tolerance, max_cycles, lr):
    """The card's procedure for first-order Taylor on the network above; returns all samples' scores and the sets."""
    units = [("0", i) for i in range(7)] + [("2", i) for i in range(5)]
    model, data = network(), batches()
    clean = {name: p.detach().clone() for name, p in model.named_parameters()}
    live = dict(model.named_parameters())
    taken, violating, history, found, cycles, norms = [], None, set(), [], 0, []

    def norm(unit):
        root, i = unit
        return torch.cat([live[f"{root}.weight"][i], live[f"{root}.bias"][i : i + 1]]).detach().norm()

    n0 = [float(norm(u)) for u in units]
    while True:
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(clean[name])
        new = set()
        for t in range(steps):
            grads = dict(
                zip(live, torch.autograd.grad(loss(model, data[len(taken) % 4]), list(live.values())), strict=True)
            )
            scores = []
            for root, i in units:
                inner = (live[f"{root}.weight"][i] * grads[f"{root}.weight"][i]).sum()
                scores.append(float((inner + live[f"{root}.bias"][i] * grads[f"{root}.bias"][i]).detach().abs()))
            taken.append(scores)
            low = lowest(scores, [7, 5], count)
            if violating is None:
                violating, history = low, set(low)
                found.append(violating)
                if len(violating) <= tolerance:
                    return taken, found, 0, norms
            new |= low - violating
            with torch.no_grad():
                for name, p in live.items():
                    p.sub_(grads[name], alpha=lr)
                for u in violating:
                    factor = n0[u] * (steps - t - 1) / steps / float(norm(units[u]))
                    root, i = units[u]
                    live[f"{root}.weight"][i] *= factor
                    live[f"{root}.bias"][i] *= factor
                norms.append([float(norm(u)) for u in units])
        violating = new - history
        history |= violating
        cycles += 1
        found.append(violating)
        if len(violating) <= tolerance or cycles == max_cycles:
            return taken, found, cycles, norms


@pytest.mark.parametrize(
    ("count", "steps", "tolerance", "max_cycles"),
    [(5, 4, 0, 10), (3, 6, 0, 10), (6, 3, 1, 10), (5, 4, 0, 1), (2, 4, 2, 10)],
)
def test_the_choice_is_that_of_the_procedure(count, steps, tolerance, max_cycles, monkeypatch):
    taken, found, cycles, _ = by_hand(count, steps, tolerance, max_cycles, lr=0.05)
    observed, sets = [], []
    observe = Cycle.observe

    def watch(self, scores):
        before = None if self.violating is None else self.violating.clone()
        observe(self, scores)
        observed.append(scores)
        if before is None or not torch.equal(before, self.violating) or self.step == 0:
            sets.append(set(self.violating.nonzero()[:, 0].tolist()))

    monkeypatch.setattr(Cycle, "observe", watch)
    model = network()
    groups = plp.trace_groups(model, batches()[0][0])
    config = plp.CRIC(steps, tolerance, max_cycles)
    keep = plp.cric(model, groups, count, batches(), loss, config, plp.Saliency("taylor1"), lr=0.05)
    torch.testing.assert_close(torch.stack(observed), torch.tensor(taken, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert sets == found
    mean = torch.tensor(taken, dtype=torch.float64).mean(0).tolist()
    gone = torch.cat([~keep["0"], ~keep["2"]]).nonzero()[:, 0].tolist()
    assert set(gone) == lowest(mean, [7, 5], count)
    assert len(observed) <= config.most_samples(12, count)
    assert cycles <= max_cycles


def test_units_on_trial_go_linearly_to_zero_and_the_oracle_says_so():
    taken, found, _, norms = by_hand(5, 4, 0, 1, lr=0.05)
    assert len(taken) == 4
    for t, row in enumerate(norms):
        for unit in found[0]:
            assert row[unit] == pytest.approx(norms[0][unit] * 4 / 3 * (3 - t) / 4, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_cycles_find_new_units_only_and_end_within_the_bound(seed):
    generator = torch.Generator().manual_seed(seed)
    size, count, tolerance = 30, 4 + 3 * (seed % 4), seed % 3
    config = plp.CRIC(sampling_steps=3, tolerance=tolerance, max_cycles=1000)
    cycle = Cycle(config, lambda scores: scores.argsort(stable=True)[:count], size)
    sets, samples, total = [], 0, torch.zeros(size, dtype=torch.float64)
    while not cycle.finished:
        scores = torch.rand(size, generator=generator, dtype=torch.float64)
        total += scores
        fraction = cycle.fraction
        assert fraction == (3 - samples % 3) / 3
        cycle.observe(scores)
        samples += 1
        if cycle.step == 0 or samples == 1:
            sets.append(set(cycle.violating.nonzero()[:, 0].tolist()))
    for i, first in enumerate(sets):
        assert all(not first & other for other in sets[i + 1 :])
    assert cycle.cycles <= 1 + (size - count) // (tolerance + 1)
    assert samples == 3 * cycle.cycles <= config.most_samples(size, count)
    torch.testing.assert_close(cycle.scores, total / samples)


def test_a_cycle_goes_on_from_its_state():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(20, generator=generator, dtype=torch.float64) for _ in range(9)]

    def fresh():
        return Cycle(plp.CRIC(3), lambda s: s.argsort(stable=True)[:6], 20)

    whole = fresh()
    for step, sample in enumerate(scores):
        resumed = fresh()
        resumed.load_state_dict(whole.state_dict())
        for cycle in (whole, resumed):
            cycle.observe(sample)
        assert torch.equal(whole.violating, resumed.violating), step
        assert torch.equal(whole.scores, resumed.scores)
        assert (whole.step, whole.cycles, whole.finished) == (resumed.step, resumed.cycles, resumed.finished)


def saturated():
    """A target that one far, saturated unit explains, and small units beside it that change the loss a little."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[0].weight.copy_(0.5 * torch.randn(6, 3, generator=generator))
        model[0].bias.zero_()
        model[0].weight[0] = torch.tensor([12.0, 0.0, 0.0])
        model[2].weight.fill_(0.05)
        model[2].weight[0, 0] = 2.0
        model[2].bias.zero_()
    data = []
    for _ in range(5):
        x = torch.randn(64, 3, generator=generator, dtype=torch.float64)
        x[:, 0] = x[:, 0].sign() * (0.5 + x[:, 0].abs())
        data.append((x, 2 * x[:, 0].sign() + 0.3 * x[:, 1]))
    return model, data


def test_a_planted_indispensable_unit_is_kept_by_cric_and_pruned_by_first_order_taylor():
    model, data = saturated()
    groups = plp.trace_groups(model, data[0][0])
    taylor = plp.Saliency("taylor1")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = loss(model, data[0]).item()
    kept = plp.cric(model, groups, 1, data, loss, saliency=taylor)
    assert bool(kept["0"][0])
    plain = plp.attach_hesso(optimizer, model, groups, 1 / 6, start=0, duration=1, periods=1, saliency=taylor)
    for batch in data[:1]:
        loss(model, batch).backward()
        optimizer.step()
    assert not bool(plain.keep()["0"][0])
    assert loss(model, data[0]).item() > 20 * before
    model, _ = saturated()
    groups.expand(kept).apply_(dict(model.named_parameters()))
    assert loss(model, data[0]).item() < 1.5 * before


def test_no_trace_is_left_of_it():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 2)
    )
    model[5].bias.requires_grad_(False)
    x = torch.randn(8, 1, 6, 6)
    groups = plp.trace_groups(model, x)
    model(x).sum().backward()
    before = fingerprint(model)
    keep = plp.cric(
        model, groups, 2, [(x, torch.arange(8) % 2)], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    )
    assert int(keep["0"].sum()) == 2
    assert fingerprint(model) == before

    def fails(m, b, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError
        return nn.functional.cross_entropy(m(b[0]), b[1])

    with pytest.raises(RuntimeError):
        plp.cric(model, groups, 2, [(x, torch.arange(8) % 2)], fails)
    assert fingerprint(model) == before


def test_what_cannot_be_is_refused():
    model = network()
    groups = plp.trace_groups(model, batches()[0][0])
    with expect_refusal("fewer than the 12 units"):
        plp.cric(model, groups, 12, batches(), loss)
    with expect_refusal("min_keep=1 in each of 2 groups", "at most 10 of 12"):
        plp.cric(model, groups, 11, batches(), loss)
    with expect_refusal("at least one batch"):
        plp.cric(model, groups, 3, [], loss)
    with expect_refusal("finite loss"):
        plp.cric(model, groups, 3, batches(), lambda m, b: loss(m, b) * torch.nan)
    with expect_refusal("finite weights and gradients"):
        plp.cric(model, groups, 3, batches(), lambda m, b: (m[0].weight * 0).sum().sqrt() + loss(m, b))
    for settings in ({"sampling_steps": 0}, {"max_cycles": 0}, {"tolerance": -1}, {"preset": "oto"}):
        with expect_refusal(f"cric.{next(iter(settings))}"):
            plp.CRIC(**settings)
    assert plp.CRIC(preset="paper").tolerated == 50
    assert plp.CRIC(tolerance=3, preset="paper").tolerated == 3
