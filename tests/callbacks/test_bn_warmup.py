from __future__ import annotations

import pytest
import torch
from fake_module import TinyModule, tiny_data
from torch import nn

import pl_prune as plp
from pl_prune.core.warmup import pooled_moments, set_statistics


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    ).double()


def batches(*cuts: int) -> list[torch.Tensor]:
    x = tiny_data().tensors[0].double()
    return [x[a:b] for a, b in zip((0, *cuts), (*cuts, len(x)), strict=True)]


def warmed(data) -> nn.Module:
    model = deep()
    moments, count = pooled_moments(model, data, model)
    set_statistics(model, moments, count)
    return model


def test_statistics_of_the_first_norm_are_those_of_one_giant_batch_at_any_cut():
    inputs = deep()[0](batches()[0]).transpose(0, 1).flatten(1)
    for cuts in [(), (10,), (7, 30, 31 + 20)]:
        norm = warmed(batches(*cuts))[1]
        torch.testing.assert_close(norm.running_mean, inputs.mean(1))
        torch.testing.assert_close(norm.running_var, inputs.var(1))
        assert int(norm.num_batches_tracked) == len(cuts) + 1


def test_deeper_norms_pool_what_training_mode_shows_them_in_any_order():
    data = batches(16, 40)
    model = deep().train()
    model[3].eval()
    seen = torch.cat([model[:5](x) for x in data]).transpose(0, 1).flatten(1)
    for order in (data, data[::-1]):
        norm = warmed(order)[5]
        torch.testing.assert_close(norm.running_mean, seen.mean(1))
        torch.testing.assert_close(norm.running_var, seen.var(1))


def test_nothing_but_batch_norm_statistics_changes():
    model = deep()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    moments, count = pooled_moments(model, batches(20), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    set_statistics(model, moments, count)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{i}.{name}" for i in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training
    assert not model[0].weight.requires_grad
    assert "forward" not in model[1].__dict__


@pytest.mark.parametrize(
    ("settings", "warm"),
    [
        ({}, True),
        ({"bn_warmup": "never"}, False),
        ({"criterion": plp.Magnitude()}, False),
        ({"criterion": plp.Magnitude(), "bn_warmup": "always"}, True),
    ],
    ids=str,
)
def test_prune_at_init_warms_up_when_it_should(fit, settings, warm, monkeypatch):
    said = []
    monkeypatch.setattr("pl_prune.callbacks.prune_at_init.rank_zero_info", said.append)
    module, _ = fit(plp.PruneAtInit(**settings), max_epochs=0)
    assert (int(module.net[1].num_batches_tracked) > 0) is warm
    assert ("batch norms warmed up on 4 batches of the train set" in said[0]) is warm


def test_norms_that_have_seen_data_are_left_alone(fit):
    module = TinyModule()
    module.train()
    module(tiny_data().tensors[0])
    before = module.net[1].running_mean.clone()
    fit(plp.PruneAtInit(), module=module, max_epochs=0)
    assert torch.equal(module.net[1].running_mean, before)


def test_a_network_without_batch_norm_is_warned_of_once(fit):
    class NoNorm(TinyModule):
        def __init__(self):
            super().__init__()
            self.net[1] = nn.Identity()

    with pytest.warns(UserWarning, match="batch norms with running statistics") as warned:
        fit(plp.PruneAtInit(bn_warmup="always"), module=NoNorm(), max_epochs=0)
    assert sum("batch norms" in str(w.message) for w in warned) == 1
    fit(plp.PruneAtInit(), module=NoNorm(), max_epochs=0)


def test_the_callback_alone_warms_up_and_leaves_the_order_of_batches(fit):
    plain, _ = fit()
    warm, _ = fit(plp.BatchNormWarmup())
    assert warm.seen == plain.seen
    started, _ = fit(plp.BatchNormWarmup(batches=2), max_epochs=0)
    assert int(started.net[1].num_batches_tracked) == 2
    with pytest.raises(plp.PruneError, match="batches=0"):
        plp.BatchNormWarmup(batches=0)


@pytest.mark.parametrize(
    ("init", "std"), [("normal", 0.01), ("xavier", (2 / (72 + 16)) ** 0.5), ("kaiming", (2 / 72) ** 0.5)]
)
def test_weights_are_drawn_anew_before_scoring(fit, init, std):
    torch.manual_seed(0)
    first, second = TinyModule(), TinyModule()
    for module in (first, second):
        fit(plp.PruneAtInit(sparsity=0.0, init=init), module=module, max_epochs=0)
    assert torch.equal(first.net[6].weight, second.net[6].weight)
    assert not torch.equal(first.net[9].weight, second.net[9].weight)
    assert abs(float(first.net[6].weight.detach().std()) / std - 1) < 0.1
