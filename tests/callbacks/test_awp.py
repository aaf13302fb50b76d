"""Adversarial weight perturbation: its algorithm, and what it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_module import TinyModule, tiny_data
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

import pl_prune as plp
from pl_prune.data.shuffle import EpochShuffle


def steady() -> TinyModule:
    module = TinyModule()
    module.net[7] = nn.Identity()  # draws of dropout depend on all that draws before it
    return module.double()


@pytest.mark.parametrize("mode", ["project", "scale"])
def test_awp_is_its_algorithm_on_kept_weights(fit, mode):
    seed_everything(3, verbose=False)
    ours = steady()
    theirs = copy.deepcopy(ours)
    prune = plp.PruneAtInit(plp.Magnitude(), 0.6)
    fit(prune, plp.AWP(0.05, mode), module=ours, seed=5, precision="64-true")

    named = dict(theirs.named_parameters())
    masks = {name: mask.double() for name, mask in prune.masks.items()}
    for name, mask in masks.items():
        named[name].data.mul_(mask)
    moved = {name: p for name, p in named.items() if p.ndim > 1}
    theirs.log = lambda *_: None
    optimizer = theirs.train().configure_optimizers()
    sampler = EpochShuffle(tiny_data())
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for i, (x, y) in enumerate(torch.utils.data.DataLoader(tiny_data(), 16, sampler=sampler)):
            held = [b.clone() for b in theirs.buffers()]
            g = torch.autograd.grad(theirs.training_step((x.double(), y), i), list(moved.values()))
            for b, value in zip(theirs.buffers(), held, strict=True):
                b.copy_(value)
            g = [d * masks.get(name, 1) for name, d in zip(moved, g, strict=True)]
            total = torch.sqrt(sum(d.square().sum() for d in g))
            weights = {name: p.detach().clone() for name, p in moved.items()}
            for (_name, p), d in zip(moved.items(), g, strict=True):
                bound = 0.05 * p.detach().norm()
                v = bound * d / d.norm() if mode == "scale" else 0.1 * d / total
                p.data.add_(v * min(1.0, float(bound / v.norm())))
            optimizer.zero_grad()
            theirs.training_step((x.double(), y), i).backward()
            for name, p in moved.items():
                p.data.copy_(weights[name])
                if name in masks:
                    p.grad.mul_(masks[name])
            optimizer.step()
            for name, mask in masks.items():
                named[name].data.mul_(mask)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)
    for name, mask in prune.masks.items():
        assert not dict(ours.named_parameters())[name][~mask].any()


def test_without_a_bound_or_before_its_epochs_nothing_changes(fit):
    dense, _ = fit()
    for awp in (plp.AWP(0), plp.AWP(0.5, warmup_epochs=2)):
        module, _ = fit(awp)
        assert all(
            torch.equal(a, b) for a, b in zip(module.state_dict().values(), dense.state_dict().values(), strict=True)
        )
    module, _ = fit(plp.AWP(0.5))
    assert not torch.equal(module.net[0].weight, dense.net[0].weight)


def test_without_a_step_weights_and_statistics_are_those_of_plain_training(fit):
    def still() -> TinyModule:
        module = TinyModule()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0, momentum=0.9)
        return module

    seed_everything(3, verbose=False)
    plain, _ = fit(module=still())
    seed_everything(3, verbose=False)
    module, _ = fit(plp.AWP(0.5, "scale"), module=still())
    for name, value in plain.named_parameters():
        assert torch.equal(dict(module.named_parameters())[name], value), name
    assert int(module.net[1].num_batches_tracked) == 8
    assert module.seen == plain.seen, "the second pass leaves no trace in the module's own attributes"


def test_averaged_weights_and_clipping_are_of_the_weights_themselves(fit):
    averaging = EMAWeightAveraging(decay=0.0)  # the average is the weights after each step
    module, _ = fit(plp.AWP(0.5, "scale"), averaging, gradient_clip_val=0.1)
    plain, _ = fit(plp.AWP(0.5, "scale"), gradient_clip_val=0.1)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(dict(module.named_parameters())[name], value)


def test_a_failing_step_leaves_the_weights_themselves(fit):
    class Failing(TinyModule):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 3:
                self.there = {name: value.clone() for name, value in awp._held.items()}
                raise RuntimeError("out of luck")

    awp, module = plp.AWP(0.5, "scale"), Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(awp, module=module)
    assert len(module.there) == 4
    for name, value in module.there.items():
        assert torch.equal(dict(module.named_parameters())[name], value)


def test_what_would_work_on_perturbed_weights_is_refused(fit):
    with pytest.raises(plp.PruneError, match="found S2AP, under which they stand still"):
        fit(plp.S2AP(0.7, warmup_epochs=0), plp.AWP())
    gradual = plp.GradualPruning(schedule=plp.Linear(final=0.5, start=1, end=3))
    with pytest.raises(plp.PruneError, match="GradualPruning before AWP"):
        fit(plp.AWP(), gradual)
    module, _ = fit(gradual, plp.AWP(0.5))
    assert abs(gradual.masks.sparsity() - 0.5) < 1e-3
    for name, mask in gradual.masks.items():
        assert not dict(module.named_parameters())[name][~mask].any()
    manual = TinyModule()
    manual.automatic_optimization = False
    with pytest.raises(plp.PruneError, match="Expected automatic optimization"):
        fit(plp.AWP(), module=manual)
