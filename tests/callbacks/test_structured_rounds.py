"""Structured pruning in rounds, on warmed up batch norms, equals the loop that one would write by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_module import TinyModule, tiny_data
from lightning.pytorch import Callback
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core.iterate import sparsity_after

X, Y = tiny_data().tensors
MAGNITUDE = plp.ByGroup(plp.Magnitude(), "mean")
ALL = plp.Samples(total=64)
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*num_workers")


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def untrained():
    torch.manual_seed(0)
    module = TinyModule()
    module.net[7] = nn.Identity()
    return module


def trained():
    """A network whose batch norm has seen data."""
    module = untrained()
    for _ in range(30):
        module(X)
    return module


class AtStart(Callback):
    def on_train_start(self, trainer, pl_module):
        self.copy = copy.deepcopy(pl_module).eval()


def by_hand(model, criterion, rounds, sparsity, target, allocation, **more):
    """Slice after every round, trace and score what is left; what is gone scores lowest from then on."""
    whole = plp.trace_groups(model, X[:2])
    keep = {root: torch.ones(size, dtype=torch.bool) for root, size in whole.sizes.items()}
    small, groups = model, whole
    for done in range(1, rounds + 1):
        found = plp.score_groups(small, criterion, groups, [(X, Y)], loss)
        lowest = min(float(s.min()) for s in found.values()) - 1.0
        scores = {root: torch.full((size,), lowest, dtype=found[root].dtype) for root, size in whole.sizes.items()}
        for root, kept in keep.items():
            scores[root][kept] = found[root]
        share = 1 - (1 - sparsity) ** (done / rounds) if done < rounds else sparsity
        keep = dict(plp.select_units(scores, whole, share, target, allocation, **more))
        small = plp.shrink(model, whole.expand(keep), X[:2], whole)
        groups = plp.trace_groups(small, X[:2])
    return keep, small


CASES = {
    "PROscore": (plp.PROscore(lam=1.0), "groups", plp.Global(), {}),
    "means over what is left": (MAGNITUDE, "params", plp.Global(), {}),
    "distances among what is left": (plp.GeometricMedian(), "macs", plp.Layerwise(), {}),
    "draws for what is left": (plp.ByGroup(plp.Random(seed=3)), "groups", plp.Global(), {"round_to": 2}),
}


@pytest.mark.parametrize("shrink", [True, False], ids=["sliced", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_rounds_are_the_loop_by_hand(fit, case, shrink):
    criterion, target, allocation, more = CASES[case]
    module, start = trained(), AtStart()
    keep, small = by_hand(copy.deepcopy(module).eval(), criterion, 3, 0.6, target, allocation, **more)
    pruner = plp.StructuredPruning(criterion, 0.6, target, allocation, shrink=shrink, rounds=3, samples=ALL, **more)
    fit(pruner, start, module=module, max_epochs=1)
    groups, found = pruner.units
    assert dict(found).keys() == keep.keys()
    for root, kept in keep.items():
        assert torch.equal(found[root], kept), root
        assert pruner.unit_scores[root].shape == kept.shape
    if shrink:
        for (name, one), (_, other) in zip(start.copy.state_dict().items(), small.state_dict().items(), strict=True):
            assert torch.equal(one, other), name
    else:
        assert pruner.masks == groups.expand(keep)
    assert ("3 rounds" in pruner.method, "rounds" in plp.StructuredPruning().method) == (True, False)


def test_rounds_change_what_is_kept_and_ratios_grow_with_them():
    assert [round(sparsity_after(e, 3, 0.875), 6) for e in (1, 2, 3)] == [0.5, 0.75, 0.875]
    model = trained().eval()
    one, _ = by_hand(model, CASES["PROscore"][0], 1, 0.6, "groups", plp.Global())
    three, _ = by_hand(model, CASES["PROscore"][0], 3, 0.6, "groups", plp.Global())
    assert any(not torch.equal(one[root], three[root]) for root in one)


def test_an_untrained_network_is_scored_on_the_statistics_of_its_data(fit):
    module = untrained()
    plain = copy.deepcopy(module)
    start = AtStart()
    pruner = plp.StructuredPruning(plp.Taylor(), 0.5, samples=ALL)
    fit(pruner, start, module=module, max_epochs=1)
    with torch.no_grad():
        seen = plain.net[0](X).transpose(0, 1).flatten(1).double()
    norm = plain.net[1]
    norm.running_mean.copy_(seen.mean(1))
    norm.running_var.copy_(seen.var(1))
    groups = plp.trace_groups(plain, X[:2])
    expected = plp.score_groups(plain, plp.Taylor(), groups, [(X, Y)], loss)
    for root, scores in expected.items():
        torch.testing.assert_close(pruner.unit_scores[root], scores, rtol=1e-4, atol=1e-6)
    kept = pruner.units[1]["net.0"]
    torch.testing.assert_close(start.copy.net[1].running_mean, norm.running_mean[kept])
    never = plp.StructuredPruning(plp.Taylor(), 0.5, samples=ALL, bn_warmup="never")
    fit(never, module=untrained(), max_epochs=1)
    assert not torch.allclose(never.unit_scores["net.0"], pruner.unit_scores["net.0"])


@pytest.mark.parametrize(("shrink", "fails"), [(True, "scoring"), (False, "scoring"), (True, "later")])
def test_statistics_are_put_back_where_nothing_is_trained(fit, shrink, fails):
    class Broken(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise RuntimeError("broken")

    module = untrained()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    sparsity = 0.99 if fails == "scoring" else 0.5
    pruner = plp.StructuredPruning(plp.Taylor(), sparsity, samples=ALL, bn_warmup="always", shrink=shrink)
    if fails == "scoring":
        with expect_refusal("at most"):
            fit(pruner, module=module)
    else:
        with pytest.raises(RuntimeError, match="broken"):
            fit(Broken(), pruner, module=module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_bad_input_is_refused():
    with expect_refusal("rounds"):
        plp.StructuredPruning(rounds=0)
    with expect_refusal("bn_warmup"):
        plp.StructuredPruning(bn_warmup="sometimes")
    with expect_refusal("warmup_batches"):
        plp.StructuredPruning(warmup_batches=0)
