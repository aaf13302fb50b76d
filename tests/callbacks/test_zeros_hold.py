"""Pruned weights are zero after every optimizer step, whatever the optimizer and whatever stands beside it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from fake_module import TinyModule, tiny_data
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

import pl_prune as plp

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "SGD with Nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD for each": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "AdamW for each": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, line_search_fn="strong_wolfe"),
}
SETTINGS = {
    "plain": {},
    "clipped by norm": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 3},
}
PRUNERS = {
    "at init": lambda: plp.PruneAtInit(sparsity=0.8),
    "gradual": lambda: plp.GradualPruning(plp.SNIP(), plp.Linear(final=0.8, start=1, end=3, every=1)),
}


class Watch(Callback):
    """Looks at weights, gradients and optimizer state around every optimizer step."""

    def __init__(self, pruner):
        self.pruner, self.steps, self.moved = pruner, 0, 0
        self.handles = []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            self.handles.append(optimizer.register_step_post_hook(lambda o, *_: self.look(pl_module, o)))
        self.before = [p.detach().clone() for p in pl_module.parameters()]

    def look(self, module, optimizer):
        self.steps += 1
        for name, keep in self.pruner.masks.items():
            p = module.get_parameter(name)
            assert bool((p[~keep] == 0).all()), name
            assert p.grad is None or not bool(p.grad[~keep].any()), name
            for value in optimizer.state.get(p, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    assert not bool(value[~keep].any()), name

    def on_train_end(self, trainer, pl_module):
        self.moved = sum(not torch.equal(a, b) for a, b in zip(self.before, pl_module.parameters(), strict=True))


def assert_exact(module, pruner, sparsity=0.8):
    total = sum(mask.numel() for mask in pruner.masks.values())
    kept = sum(int((module.get_parameter(name) != 0).sum()) for name in pruner.masks)
    assert total - kept == int(sparsity * total + 0.5)


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_hold(fit, optimizer, settings, pruner):
    class Module(TinyModule):
        def configure_optimizers(self):
            return optimizer(self.parameters())

    pruner = pruner()
    watch = Watch(pruner)
    module, _ = fit(pruner, watch, module=Module(), **settings)
    assert watch.steps == (4 if "accumulate_grad_batches" in settings else 8)
    assert watch.moved > 6
    assert_exact(module, pruner)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
def test_zeros_hold_in_every_precision(fit, pruner, precision):
    pruner = pruner()
    watch = Watch(pruner)
    module, _ = fit(pruner, watch, module=TinyModule("adamw"), precision=precision)
    assert watch.steps == 8
    assert_exact(module, pruner)


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
def test_an_overflow_skips_the_step_and_nothing_else(fit, pruner):
    class Overflow(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if self.training and self.trainer.global_step in (1, 2) else 1.0)

    pruner = pruner()
    watch = Watch(pruner)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    module, _ = fit(pruner, watch, module=Overflow(), plugins=[plugin], gradient_clip_val=0.5)
    assert watch.steps == 6
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert_exact(module, pruner)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_what_is_clipped_is_the_gradient_of_the_kept_weights(fit, manual, algorithm):
    """A huge gradient on pruned weights alone must not shrink the update of the others."""

    class Huge(TinyModule):
        blow_up = 0.0

        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.net[7] = nn.Identity()
            self.automatic_optimization = not manual

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def scoring_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            weight = self.net[6].weight
            loss = self.scoring_step(batch, batch_idx) + self.blow_up * weight[weight == 0].sum()
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.1, algorithm)
                optimizer.step()
            return loss

    def trained(blow_up):
        module = Huge()
        module.blow_up = blow_up
        clip = {} if manual else {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
        fit(plp.PruneAtInit(sparsity=0.5), module=module, **clip)
        return module.state_dict()

    plain, huge = trained(0.0), trained(1e6)
    for name, value in plain.items():
        assert torch.equal(value, huge[name]), name


class GAN(LightningModule):
    """Two optimizers, stepped by hand, of which one steps more often."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 64))
        self.critic = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))

    def _generator_loss(self, batch):
        noise = batch[0].flatten(1)[:, :4]
        return -self.critic(self.generator(noise)).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._generator_loss(batch))

    def scoring_step(self, batch, batch_idx):
        return self._generator_loss(batch)

    def training_step(self, batch, batch_idx):
        of_generator, of_critic = self.optimizers()
        for _ in range(2):
            noise = batch[0].flatten(1)[:, :4]
            of_critic.zero_grad()
            self.manual_backward(
                (self.critic(self.generator(noise).detach()) - self.critic(batch[0].flatten(1))).mean()
            )
            self.clip_gradients(of_critic, 0.5, "norm")
            of_critic.step()
        of_generator.zero_grad()
        self.manual_backward(self._generator_loss(batch))
        of_generator.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.generator.parameters(), 0.01), torch.optim.RMSprop(
            self.critic.parameters(), 0.01, weight_decay=0.1
        )


@pytest.mark.parametrize("kind", PRUNERS)
def test_a_gan_prunes_its_generator_alone(fit, kind):
    select = plp.Select(include=["generator.*"])
    pruner = {
        "at init": lambda: plp.PruneAtInit(sparsity=0.8, select=select),
        "gradual": lambda: plp.GradualPruning(
            plp.SNIP(), plp.Linear(final=0.8, start=1, end=4, every=1), select=select
        ),
    }[kind]()
    watch = Watch(pruner)
    levels = []

    class Levels(Callback):
        def on_train_batch_end(self, *_):
            levels.append(pruner.masks.sparsity())

    module, _ = fit(pruner, watch, Levels(), module=GAN())
    assert set(pruner.masks) == {"generator.0.weight", "generator.2.weight", "generator.4.weight"}
    assert watch.steps == 8 * 3
    assert_exact(module, pruner)
    assert all(bool((p != 0).all()) for p in module.critic[0].parameters())
    if kind == "gradual":  # the generator's steps count, not the critic's
        assert [round(b - a, 2) for a, b in pairwise(levels)] == [0.0, 0.27, 0.27, 0.27, 0.0, 0.0, 0.0]


def test_several_optimizers_each_hold_their_own_zeros(fit):
    class Two(TinyModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def scoring_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.scoring_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            body, head = self.net[:6].parameters(), self.net[6:].parameters()
            return torch.optim.AdamW(body, 0.01), torch.optim.SGD(head, 0.1, momentum=0.9)

    pruner = plp.PruneAtInit(sparsity=0.8)
    watch = Watch(pruner)
    module, _ = fit(pruner, watch, module=Two())
    assert watch.steps == 16
    assert_exact(module, pruner)


def test_a_weight_that_thaws_under_manual_optimization_is_clipped_without_its_pruned_part(fit):
    class Thawing(TinyModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net[6].weight.requires_grad_(False)
            self.pruned_norms = []

        def scoring_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                self.net[6].weight.requires_grad_(True)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.scoring_step(batch, batch_idx))
            weight = self.net[6].weight
            if weight.grad is not None:
                self.pruned_norms.append(float(weight.grad[weight == 0].abs().sum()))
            optimizer.step()

    pruner = plp.PruneAtInit(sparsity=0.8, select=plp.Select(frozen=True))
    module, _ = fit(pruner, module=Thawing())
    assert module.pruned_norms == [0.0] * 6
    assert_exact(module, pruner)


def test_lbfgs_forgets_its_curvature_when_masks_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    x, y = next(iter(DataLoader(tiny_data(), 64)))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.flatten(1)), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[model[0].weight]["old_dirs"]
    masks = plp.Global()(plp.score(model, plp.Magnitude()), 0.5)
    plp.attach_masks(optimizer, model, masks)
    assert not optimizer.state
    optimizer.step(closure)
    assert plp.MaskSet.from_zeros({"0.weight": model[0].weight}) == masks
    direction = optimizer.state[model[0].weight]["d"][: 64 * 8].view(8, 64)
    assert not bool(direction[~masks["0.weight"]].any())
