"""HESSO against brute force: a loop over units and entries in double precision."""

from __future__ import annotations

import copy
import io
from itertools import combinations

import pytest
import torch
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core.groups import Group, Member
from pl_prune.models import ResNet
from pl_prune.optim.pace import Budget, Pace, split
from pl_prune.optim.saliency import gather
from pl_prune.optim.units import Rows, Units, trainable

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.05),
    "momentum": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda ps: torch.optim.Adam(ps, 1e-2, amsgrad=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 1e-3, momentum=0.5),
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
        nn.Conv2d(6, 4, 3), nn.SiLU(), nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5), nn.Tanh(), nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip


def data(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 8, 8, generator=generator, dtype=dtype), torch.arange(16) % 3


def backward(model, seed):
    inputs, labels = data(seed, next(model.parameters()).dtype)
    nn.functional.cross_entropy(model(inputs), labels).backward()


def train(model, optimizer, steps, first=0, after=lambda step: None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        after(step)


def slices(groups, root, unit):
    """Return (name, index) of every slice of a unit: the oracle's notion of it."""
    found = []
    for member in groups[root].members:
        if member.kind == "out":
            for position in member.index[unit].tolist():
                found.append((member.name, (slice(None),) * member.dim + (position,)))
    return found


def vector(groups, tensors, root, unit):
    return torch.cat([tensors[name].detach()[index].double().flatten() for name, index in slices(groups, root, unit)])


def every(groups):
    return [(root, unit) for root, size in groups.sizes.items() for unit in range(size)]


def zeros(model, groups):
    live = dict(model.named_parameters())
    return {u for u in every(groups) if not bool(vector(groups, live, *u).any())}


@pytest.fixture(scope="module")
def groups():
    return plp.trace_groups(network(), data()[0])


def gone(hesso):
    return {(root, i) for root, mask in hesso.keep().items() for i in (~mask).nonzero()[:, 0].tolist()}


def test_sums_are_those_of_a_loop_over_units(groups):
    model = network(torch.float64)
    backward(model, 0)
    live = dict(model.named_parameters())
    grads = {name: p.grad for name, p in live.items()}
    units = Units(groups, live)
    statistics = gather(units, live, grads)
    assert statistics.dtype == torch.float64
    for i, unit in enumerate(every(groups)):
        x, g = vector(groups, live, *unit), vector(groups, grads, *unit)
        expected = torch.stack([x @ x, x @ g, g @ g, (x * g) @ (x * g)])
        torch.testing.assert_close(statistics[:, i], expected, rtol=1e-12, atol=0)
        assert units.entries[i] == len(x)


@pytest.mark.parametrize("preset", ["corrected", "paper", "oto"])
def test_saliencies_are_those_of_the_table(groups, preset):
    model = network(torch.float64)
    backward(model, 0)
    live = dict(model.named_parameters())
    grads = {name: p.grad for name, p in live.items()}
    units = Units(groups, live)
    here = torch.arange(units.size) % 3 > 0
    columns = {"magnitude": [], "avg_magnitude": [], "cosine": [], "taylor1": [], "taylor2": []}
    for unit in every(groups):
        x, g = vector(groups, live, *unit), vector(groups, grads, *unit)
        n, cosine, q = len(x), float(x @ g / (x.norm() * g.norm())), (x * x * g * g).sum()
        columns["magnitude"].append(x.norm())
        columns["avg_magnitude"].append(x.norm() / (n if preset == "oto" else n**0.5))
        columns["cosine"].append(x.new_tensor({"corrected": 1 - cosine, "paper": cosine, "oto": 1 + cosine}[preset]))
        columns["taylor1"].append((x @ g).abs())
        second = {"corrected": (x @ g - q / 2).abs(), "paper": x @ g + q / 2, "oto": (x @ g) ** 2 / 2}
        columns["taylor2"].append(second[preset])
    weights = {"magnitude": 0.3, "avg_magnitude": 0.1, "cosine": 0.2, "taylor1": 0.15, "taylor2": 0.25}
    mixture = torch.zeros(units.size, dtype=torch.float64)
    for part, values in columns.items():
        values = torch.stack(values).double()
        mixture += weights[part] * values / (values.norm() if preset == "oto" else values[here].sum())
        alone = plp.Saliency(part, preset).score(gather(units, live, grads), units.entries, here)
        torch.testing.assert_close(alone, values, rtol=1e-9, atol=1e-12)
    mixed = plp.Saliency(preset=preset, weights=weights).score(gather(units, live, grads), units.entries, here)
    torch.testing.assert_close(mixed, mixture, rtol=1e-9, atol=1e-12)


def test_second_order_taylor_is_exact_on_a_quadratic_and_has_the_sign_of_corrected():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A, x = A @ A.T, torch.randn(6, generator=generator, dtype=torch.float64)

    def f(v):
        return v @ A @ v / 2 - v.sum()

    gradient = A @ x - 1
    for unit in (slice(0, 2), slice(2, 6)):
        without = x.clone()
        without[unit] = 0
        step = torch.zeros_like(x)
        step[unit] = x[unit]
        exact = step @ gradient - step @ A @ step / 2
        torch.testing.assert_close(f(x) - f(without), exact)
        # The same with the Hessian diag(g^2), which is what the statistics hold.
        q = (step * gradient).square().sum()
        statistics = torch.stack([step @ step, step @ gradient, gradient[unit] @ gradient[unit], q])[:, None]
        corrected = plp.Saliency("taylor2").score(statistics, torch.ones(1), torch.ones(1, dtype=torch.bool))
        torch.testing.assert_close(corrected[0], (step @ gradient - q / 2).abs())


def test_cosine_knows_no_scale_and_otos_second_order_ranks_as_the_first(groups):
    model = network(torch.float64)
    backward(model, 0)
    live = dict(model.named_parameters())
    grads = {name: p.grad for name, p in live.items()}
    units, here = Units(groups, live), torch.ones(15, dtype=torch.bool)
    plain, scaled = gather(units, live, grads), gather(units, {n: 3 * p for n, p in live.items()}, grads)

    def score(kind, statistics, preset="corrected"):
        return plp.Saliency(kind, preset).score(statistics, units.entries, here)

    torch.testing.assert_close(score("cosine", plain), score("cosine", scaled))
    assert torch.equal(score("taylor1", plain).argsort(), score("taylor2", plain, "oto").argsort())
    permuted = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    again = plp.Saliency().score(plain[:, permuted], units.entries[permuted], here)
    torch.testing.assert_close(again, plp.Saliency().score(plain, units.entries, here)[permuted])
    assert torch.equal(score("random", plain), score("random", scaled))


def test_a_zero_unit_and_a_zero_gradient_score_finitely():
    zero = torch.zeros(4, 3)
    zero[0] = torch.tensor([0.0, 1.0, 4.0])
    for preset in ("corrected", "paper", "oto"):
        scores = plp.Saliency(preset=preset).score(zero, torch.ones(3), torch.ones(3, dtype=torch.bool))
        assert bool(scores.isfinite().all())
        assert scores.argsort().tolist() == [0, 1, 2]
    zero[1, 1] = torch.nan
    assert plp.Saliency("magnitude").score(zero, torch.ones(3), torch.ones(3, dtype=torch.bool)) is None


def units_of(*sizes):
    members = [Member(f"{i}.weight", 0, torch.arange(n)[:, None]) for i, n in enumerate(sizes)]
    found = plp.ParameterGroups(
        [Group(str(i), n, (m,)) for i, (n, m) in enumerate(zip(sizes, members, strict=True))],
        {f"{i}.weight": (n, 2 + i) for i, n in enumerate(sizes)},
        {f"{i}.weight": 1 + i for i in range(len(sizes))},
    )
    return Units(found, {name: torch.ones(shape) for name, shape in found.shapes.items()})


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_that_of_brute_force(seed):
    """Of all sets that leave min_keep units in each group, the one of lowest sum; ties by number."""
    generator = torch.Generator().manual_seed(seed)
    units, min_keep = units_of(3, 4, 2), 1 + seed % 2
    scores = torch.randint(0, 4 if seed % 3 == 0 else 1000, (9,), generator=generator).double()
    before = torch.zeros(9, dtype=torch.bool)
    before[4] = True
    room = [max(0, int(((units.layer == i) & ~before).sum()) - min_keep) for i in range(3)]
    count = sum(room) - seed % 2

    def fits(chosen):
        return all(int((units.layer[list(chosen)] == i).sum()) <= room[i] for i in range(3))

    free = [i for i in range(9) if not before[i]]
    best = min((c for c in combinations(free, count) if fits(c)), key=lambda c: (sum(scores[list(c)]), c))
    found = Budget(units, (count + 1) / 9, "groups", min_keep).lowest(scores, before, 0, 1)
    assert sum(scores[found]) == sum(scores[list(best)])
    walked, left = [], list(room)
    for i in sorted(free, key=lambda i: (float(scores[i]), i)):  # the walk in ascending order that skips full groups
        if left[units.layer[i]] and len(walked) < count:
            walked.append(i)
            left[units.layer[i]] -= 1
    assert found.tolist() == walked


@pytest.mark.parametrize("target", ["params", "macs"])
def test_parameters_and_macs_go_with_as_few_units_as_possible(target):
    units = units_of(5, 6, 4)
    scores = torch.rand(15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    at = ("params", "macs").index(target)
    total = units.groups.cost({})[at]
    budget, gone = Budget(units, 0.6, target, 1), torch.zeros(15, dtype=torch.bool)
    for period in range(4):
        chosen = budget.lowest(scores, gone, period, 4)
        allowed = total - budget.removal * (period + 1) // 4
        after = gone.index_fill(0, chosen, True)
        assert budget._left(after) <= allowed
        assert budget._left(gone.index_fill(0, chosen[:-1], True)) > allowed
        gone = after
    assert budget.removal == int(0.6 * total + 0.5)


def test_units_and_steps_are_split_evenly_and_whole():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        total, parts = (
            int(torch.randint(0, 5000, (), generator=generator)),
            int(torch.randint(1, 40, (), generator=generator)),
        )
        found = split(total, parts)
        assert (sum(found), len(found)) == (total, parts)
        assert max(found) - min(found) <= 1
    assert Pace.fractions(0.1, 0.1, 10, 1000) == Pace(100, (10,) * 10)
    assert Pace.fractions(0.1, 0.2, 3, 99).end == 30  # 29.7 and a half is rounded up


def test_resnet18_has_2880_units_and_seventy_per_cent_of_them_are_2016():
    torch.manual_seed(0)
    model = ResNet(18)
    groups = plp.trace_groups(model, torch.randn(1, 3, 16, 16))
    live = dict(model.named_parameters())
    units = Units(groups, live)
    assert units.size == 2880
    assert Budget(units, 0.7, "groups", 1).removal == 2016
    covered = sum(p.numel() for n, p in live.items() if n in units.names)
    assert int(units.entries.sum()) == covered
    assert sum(p.numel() for p in live.values()) - covered == live["fc.weight"].numel() + live["fc.bias"].numel()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_target_of_zero_and_the_steps_before_the_start_are_the_plain_optimizers(groups, make):
    plain, nothing, later = network(), network(), network()
    optimizers = [make(m.parameters()) for m in (plain, nothing, later)]
    plp.attach_hesso(optimizers[1], nothing, groups, 0.0, start=0, duration=3, periods=3)
    plp.attach_hesso(optimizers[2], later, groups, 0.5, start=6, duration=3, periods=3)
    for model, optimizer in zip((plain, nothing, later), optimizers, strict=True):
        train(model, optimizer, 6)
    for a, b, c in zip(plain.parameters(), nothing.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_norms_fall_linearly_and_the_zeros_are_exactly_the_chosen_units_for_good(groups, make):
    model = network()
    optimizer = make(model.parameters())
    live = dict(model.named_parameters())
    hesso = plp.attach_hesso(optimizer, model, groups, 0.6, start=2, duration=11, periods=3)
    counts, seen, n0 = split(9, 3), [], {}

    def check(step):
        assert hesso.steps == step + 1
        active = {u for u, s in zip(every(groups), hesso.status.tolist(), strict=True) if s == 1}
        if hesso.done == 1 and hesso.running:
            n0.update(dict.fromkeys(active))
            seen.append(active)
        length = hesso.pace.lengths[hesso.period] if hesso.running else 1
        for unit in active:
            norm = float(vector(groups, live, *unit).norm())
            n0[unit] = n0[unit] or norm / (1 - hesso.done / length)
            assert norm == pytest.approx(n0[unit] * (1 - hesso.done / length), rel=1e-6)
        assert zeros(model, groups) == gone(hesso)
        assert len(gone(hesso)) == sum(counts[: hesso.period])

    train(model, optimizer, 13, after=check)
    assert hesso.finished
    final = gone(hesso)
    assert len(final) == 9
    assert set().union(*seen) == final
    assert len(seen) == 3
    train(model, optimizer, 100, first=13, after=lambda step: None)
    assert zeros(model, groups) == final
    for name, mask in hesso.masks().items():
        for value in optimizer.state[live[name]].values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                assert not bool(value[~mask].any())


def test_the_norm_at_the_choice_is_that_of_the_weights_the_gradient_was_taken_at(groups):
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    live = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in live.items()}
    hesso = plp.attach_hesso(optimizer, model, groups, 0.4, start=0, duration=4, periods=1)

    def check(step):
        for unit, status in zip(every(groups), hesso.status.tolist(), strict=True):
            expected = vector(groups, before, *unit) * (1 - (step + 1) / 4 if status else 1)
            torch.testing.assert_close(vector(groups, live, *unit), expected)

    train(model, optimizer, 4, after=check)
    assert len(gone(hesso)) == 6


def test_one_period_of_one_step_is_hard_zeroing_after_the_plain_step(groups):
    plain, model = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (plain, model)]
    hesso = plp.attach_hesso(optimizers[1], model, groups, 0.4, start=2, duration=1, periods=1)
    for m, optimizer in zip((plain, model), optimizers, strict=True):
        train(m, optimizer, 3)
    masks = hesso.masks()
    assert masks.sparsity() > 0
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        expected = a * masks[name] if name in masks else a
        assert torch.equal(expected, b)


def test_the_units_are_chosen_by_raw_gradients_among_those_left(groups):
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    saliency = plp.Saliency("taylor1")
    hesso = plp.attach_hesso(optimizer, model, groups, 0.6, start=1, duration=4, periods=2, saliency=saliency)
    live = dict(model.named_parameters())
    before, left = hesso.before_step, [None]

    def choose(optimizer):
        due = hesso.due
        status = hesso.status.clone()
        before(optimizer)
        if due:
            grads = {name: p.grad for name, p in live.items()}
            scores = [float((vector(groups, live, *u) @ vector(groups, grads, *u)).abs()) for u in every(groups)]
            sizes, chosen = dict(groups.sizes), []
            for root, _ in [u for u, s in zip(every(groups), status, strict=True) if s]:
                sizes[root] -= 1
            for i in sorted((i for i in range(15) if not status[i]), key=scores.__getitem__):
                root = every(groups)[i][0]
                if sizes[root] > 1 and len(chosen) < split(9, 2)[hesso.period]:
                    chosen.append(i)
                    sizes[root] -= 1
            assert sorted(chosen) == ((hesso.status == 1) & (status == 0)).nonzero()[:, 0].tolist()
            left.append(len(chosen))

    hesso.before_step = choose
    train(model, optimizer, 6)
    assert left == [None, 4, 5]


def test_the_share_of_saliency_that_shrinking_units_hold_is_that_of_a_loop(groups):
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    saliency = plp.Saliency("taylor1")
    hesso = plp.attach_hesso(optimizer, model, groups, 0.4, start=1, duration=8, periods=2, saliency=saliency)
    live = dict(model.named_parameters())
    before, shares = hesso.before_step, []

    def look(optimizer):
        chosen = hesso.due
        before(optimizer)
        grads = {name: p.grad for name, p in live.items()}
        score = [float((vector(groups, live, *u) @ vector(groups, grads, *u)).abs()) for u in every(groups)]
        shrinking, left = (
            (sum(s for s, n in zip(score, hesso.status, strict=True) if n in of)) for of in ([1], [0, 1])
        )
        assert hesso.held(optimizer) == pytest.approx(shrinking / left, rel=1e-12)
        if chosen:
            assert hesso.held(optimizer) == pytest.approx(hesso.share)
        shares.append(hesso.held(optimizer))

    hesso.before_step = look
    train(model, optimizer, 11)
    assert [share > 0 for share in shares] == [False] + [True] * 8 + [False] * 2


def test_gradients_that_are_not_finite_put_the_choice_off_by_a_step(groups):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    hesso = plp.attach_hesso(optimizer, model, groups, 0.4, start=1, duration=2, periods=2)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    backward(model, 1)
    weight = model[3].weight
    weight.grad[0, 0, 0, 0] = torch.nan
    hesso.before_step(optimizer)
    assert hesso.due
    assert not hesso.running
    assert not bool(hesso.status.any())
    train(model, optimizer, 2, first=1)
    assert len(gone(hesso)) == 6


def test_a_state_taken_at_any_step_goes_on_bit_for_bit(groups):
    def fresh():
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        return model, optimizer, plp.attach_hesso(optimizer, model, groups, 0.6, start=2, duration=11, periods=3)

    model, optimizer, hesso = fresh()
    states = []

    def keep(step):
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), hesso.state_dict()], file)
        states.append(file.getvalue())

    train(model, optimizer, 16, after=keep)
    for step, state in enumerate(states):
        again, other, resumed = fresh()
        weights, moments, own = torch.load(io.BytesIO(state), weights_only=True)
        again.load_state_dict(weights)
        other.load_state_dict(copy.deepcopy(moments))
        resumed.load_state_dict(own)
        train(again, other, 15 - step, first=step + 1)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(hesso.status, resumed.status)


def test_detaching_leaves_the_optimizer_alone(groups):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    hesso = plp.attach_hesso(optimizer, model, groups, 0.5, start=0, duration=1, periods=1)
    train(model, optimizer, 2)
    hesso.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 3)
    assert hesso.steps == 2


def test_what_is_frozen_stays_whole(groups):
    model = network()
    model[3].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    hesso = plp.attach_hesso(optimizer, model, groups, 0.5, start=0, duration=1, periods=1)
    assert list(hesso.keep()) == ["0", "6"]
    assert hesso.units.groups.rejected["3"].startswith("a parameter of it is frozen")


def test_norms_of_rows_and_nothing_else_change():
    units = units_of(4, 3)
    tensors = {"0.weight": torch.randn(4, 2), "1.weight": torch.randn(3, 3)}
    before = {name: t.clone() for name, t in tensors.items()}
    rows = Rows(units, torch.tensor([1, 6]))
    tensors["1.weight"][2] = 0
    rows.scale_to_(tensors, torch.tensor([2.0, 5.0]))
    assert float(tensors["0.weight"][1].norm()) == pytest.approx(2)
    assert not bool(tensors["1.weight"][2].any())
    tensors["0.weight"][1] = torch.inf
    rows.fill_(tensors)
    assert not bool(tensors["0.weight"][1].any())
    for name, row in (("0.weight", [0, 2, 3]), ("1.weight", [0, 1])):
        assert torch.equal(tensors[name][row], before[name][row])


def test_what_cannot_be_is_refused(groups):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def attach(sparsity=0.5, optimizer=optimizer, groups=groups, **settings):
        return plp.attach_hesso(optimizer, model, groups, sparsity, **{"start": 0, "duration": 10, **settings})

    for sparsity in (-0.1, 1.0, 1.5, "half"):
        with expect_refusal("sparsity in [0, 1)"):
            attach(sparsity)
    with expect_refusal("min_keep=3 in each of 3 groups", "at most 6 of 15"):
        attach(0.6, min_keep=3)
    with expect_refusal("at least one optimizer step in each of 10 periods", "found 9"):
        attach(duration=9)
    with expect_refusal("whole number of steps", "0.1"):
        attach(start=0.1)
    with expect_refusal("one of target_group_sparsity", "found 2"):
        attach(target_macs=0.5)
    with expect_refusal("one of target_group_sparsity", "found 0"):
        attach(None)
    with expect_refusal("at least one group", "found none"):
        attach(groups=groups.subset([]))
    with expect_refusal("as traced", "Trace this network"):
        plp.attach_hesso(optimizer, nn.Linear(2, 2), groups, 0.5, start=0, duration=10)
    with expect_refusal("training run of known length"):
        Pace.fractions(0.1, 0.1, 10, float("inf"))
    with expect_refusal("to be one of", "cosinus"):
        plp.Saliency("cosinus")
    with expect_refusal("saliency.weights", "taylor3"):
        plp.Saliency(weights={"taylor3": 1.0})
    attached = attach()
    with expect_refusal("found a closure"):
        optimizer.step(lambda: torch.zeros(()))
    attached.detach()
    state = attached.state_dict()
    with expect_refusal("found that of others"):
        attach(groups=groups.subset(["0"])).load_state_dict(state)


def test_a_unit_split_over_two_optimizers_is_refused(groups):
    model = network()
    live = dict(model.named_parameters())
    halves = [
        torch.optim.SGD([live["0.weight"]], 0.1),
        torch.optim.SGD([p for n, p in live.items() if n != "0.weight"], 0.1),
    ]
    with expect_refusal("one optimizer for all parameters of a unit of '0'", "0.weight, 1.weight"):
        trainable(groups, live, halves)
