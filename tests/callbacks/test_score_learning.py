"""Learned scores inside fits: bit for bit those of a parametrized network, with any optimizer, and through checkpoints."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from fake_module import TinyModule, tiny_data, tiny_loader
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from test_resume import Loader, Steady
from torch import nn

import pl_prune as plp
from pl_prune.adversarial.scores import top_mask
from pl_prune.data.shuffle import EpochShuffle

SELECT = plp.Select(output_layer=True)


class Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, keep):
        return top_mask(scores, keep).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Subnet(nn.Module):
    """A layer as the methods' own codes have it: scores are parameters, weights are not."""

    def __init__(self, layer: nn.Module, learner: plp.ScoreLearner, name: str, keep: int) -> None:
        super().__init__()
        self.layer = layer
        w0, scores = learner.begin(name, layer.weight, 0)
        del layer.weight
        self.w0, self.scores, self.keep = w0, nn.Parameter(scores), keep
        if layer.bias is not None:
            layer.bias.requires_grad_(False)

    def forward(self, x):
        self.layer.weight = self.w0 * Mask.apply(self.scores.abs(), self.keep)
        return self.layer(x)


def steady(optimizer: str = "sgd") -> TinyModule:
    """Without dropout, whose draws depend on all that draws before it."""
    module = TinyModule(optimizer)
    module.net[7] = nn.Identity()
    return module


def plain_fit(module: TinyModule, epochs: int = 2, clip: float | None = None, accumulate: int = 1) -> TinyModule:
    """The loop that a Trainer runs, written out."""
    optimizer = module.configure_optimizers()
    module.log = lambda *_: None
    data = tiny_data()
    sampler = EpochShuffle(data)
    loader = torch.utils.data.DataLoader(data, 16, sampler=sampler)
    module.train()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for i, batch in enumerate(loader):
            loss = module.training_step(batch, i) / accumulate
            if i % accumulate == 0:
                optimizer.zero_grad()
            loss.backward()
            if (i + 1) % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], clip)
                optimizer.step()
    return module


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("how", [{}, {"accumulate": 2}, {"clip": 0.05}], ids=["plain", "accumulated", "clipped"])
def test_scores_are_those_of_parameters_bit_for_bit(fit, optimizer, how):
    seed_everything(3, verbose=False)
    ours = steady(optimizer)
    start = copy.deepcopy(ours.state_dict())
    callback = plp.ScoreLearning(0.7)
    settings = {"gradient_clip_val": how.get("clip"), "accumulate_grad_batches": how.get("accumulate", 1)}
    scores = Watch(callback)
    torch.manual_seed(5)
    fit(callback, scores, module=ours, seed=5, **settings)

    theirs = steady(optimizer)
    theirs.load_state_dict(start)
    theirs = wrapped(theirs, callback)
    seed_everything(5, verbose=False)
    plain_fit(theirs, clip=how.get("clip"), accumulate=how.get("accumulate", 1))
    layers = {name: layer for name, layer in theirs.named_modules() if isinstance(layer, Subnet)}
    assert len(layers) == 4
    for name, layer in layers.items():
        found, expected = scores.last[f"{name}.weight"], layer.scores.detach()
        if "accumulate" in how:  # sums of products, where theirs are products of sums
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found, expected), name
            expected = layer.w0 * top_mask(layer.scores, layer.keep)
            assert torch.equal(dict(ours.named_modules())[name].weight, expected)
        assert not torch.equal(layer.scores, layer.w0)
    for key in ("net.1.weight", "net.1.running_mean", "net.0.bias", "net.9.bias"):
        if key in start:
            named = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
            found = named.get(key, named.get(key.replace(".bias", ".layer.bias")))
            torch.testing.assert_close(ours.state_dict()[key], found, msg=key)
    assert torch.equal(ours.net[9].bias, start["net.9.bias"])
    assert not torch.equal(ours.net[1].weight, start["net.1.weight"])


def wrapped(module: TinyModule, callback: plp.ScoreLearning) -> TinyModule:
    params = SELECT(module)
    counts = callback.learner.counts({name: p.numel() for name, p in params.items()}, callback.sparsity)
    for name in params:
        index = int(name.split(".")[1])
        module.net[index] = Subnet(module.net[index], callback.learner, name, counts[name])
    return module


class Watch(Callback):
    """Keep the scores after every batch."""

    def __init__(self, callback: plp.ScoreLearning) -> None:
        self.callback = callback
        self.all: list[dict[str, torch.Tensor]] = []

    @property
    def last(self) -> dict[str, torch.Tensor]:
        return self.all[-1]

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.all.append({name: s.clone() for name, s in self.callback.scored.scores.items()})
        kept = self.callback.scored.kept_weights()
        for name, p in pl_module.named_parameters():
            if name in kept and not self.callback.scored.moved:
                assert torch.equal(p, kept[name])


def scores_of(fit, callback: plp.ScoreLearning, *others, module=None, **settings):
    watch = Watch(callback)
    module, trainer = fit(callback, watch, *others, module=module, **settings)
    return watch, module, trainer


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("learner", [plp.HYDRA(), plp.HARP(weight=1.0), plp.RLTH()], ids=lambda x: type(x).__name__)
def test_without_a_bound_s2ap_is_its_learner_bit_for_bit(fit, learner):
    plain, module, _ = scores_of(fit, plp.ScoreLearning(0.7, learner))
    wrapped_, other, _ = scores_of(fit, plp.S2AP(0.7, learner, gamma=0, warmup_epochs=0))
    assert same(plain.last, wrapped_.last)
    assert same(module.state_dict(), other.state_dict())
    moved, _, _ = scores_of(fit, plp.S2AP(0.7, learner, gamma=0.3, warmup_epochs=0))
    assert not same(plain.last, moved.last)


@pytest.mark.parametrize(
    "how", [{}, {"perturbation": "reuse"}, {"perturb": "weights"}, {"mode": "project", "z_persistent": True}]
)
def test_without_a_step_scores_are_as_before_bit_for_bit(fit, how):
    module = TinyModule()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0, momentum=0.9, weight_decay=0.1)
    watch, module, _ = scores_of(fit, plp.S2AP(0.7, gamma=0.3, warmup_epochs=0, **how), module=module)
    first = {name: plp.HYDRA().begin(name, w0, 0)[1] for name, w0 in watch.callback._kept["weights"].items()}
    assert same(watch.last, first)
    assert len(watch.all) == 8


class Reference:
    """Algorithm 1 on a parametrized network, written out: s+ = s + z, step by the gradient there, z taken off."""

    def __init__(self, module: TinyModule, gamma: float, mode: str, reuse: bool) -> None:
        self.module, self.gamma, self.mode, self.reuse = module, gamma, mode, reuse
        self.layers = {n: m for n, m in module.named_modules() if isinstance(m, Subnet)}
        self.before: list[torch.Tensor] | None = None

    def gradient(self, batch, i) -> list[torch.Tensor]:
        held = {name: b.clone() for name, b in self.module.named_buffers()}
        state = torch.get_rng_state()
        scores = [layer.scores for layer in self.layers.values()]
        found = torch.autograd.grad(self.module.training_step(batch, i), scores)
        torch.set_rng_state(state)
        for name, b in self.module.named_buffers():
            b.copy_(held[name])
        return list(found)

    def step(self, optimizer, batch, i) -> None:
        scores = [layer.scores for layer in self.layers.values()]
        g = self.before if self.reuse else self.gradient(batch, i)
        saved = [s.detach().clone() for s in scores]
        if g is not None:
            total = torch.sqrt(sum(x.square().sum() for x in g))
            lr = optimizer.param_groups[0]["lr"]
            for s, x in zip(scores, g, strict=True):
                bound = self.gamma * s.norm()
                z = bound * x / x.norm() if self.mode == "scale" else lr * x / total
                z = z * min(1.0, float((bound / z.norm()).detach()))
                s.data.add_(z.detach())
        optimizer.zero_grad()
        self.module.training_step(batch, i).backward()
        self.before = [s.grad.clone() for s in scores]
        for s, old in zip(scores, saved, strict=True):
            s.data.copy_(old)
        optimizer.step()


@pytest.mark.parametrize(
    ("mode", "perturbation"), [("project", "gradient"), ("scale", "gradient"), ("project", "reuse"), ("scale", "reuse")]
)
def test_s2ap_is_its_algorithm(fit, mode, perturbation):
    seed_everything(3, verbose=False)
    ours = steady().double()
    start = copy.deepcopy(ours.state_dict())
    callback = plp.S2AP(0.7, gamma=0.05, mode=mode, warmup_epochs=0, perturbation=perturbation)
    watch, ours, _ = scores_of(fit, callback, module=ours, seed=5, precision="64-true")

    theirs = steady().double()
    theirs.load_state_dict(start)
    theirs = wrapped(theirs, callback)
    theirs.log = lambda *_: None
    optimizer = theirs.configure_optimizers()
    sampler = EpochShuffle(tiny_data())
    reference = Reference(theirs.train(), 0.05, mode, perturbation == "reuse")
    seed_everything(5, verbose=False)
    number = 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for i, (x, y) in enumerate(torch.utils.data.DataLoader(tiny_data(), 16, sampler=sampler)):
            reference.step(optimizer, (x.double(), y), i)
            for name, layer in reference.layers.items():
                torch.testing.assert_close(
                    watch.all[number][f"{name}.weight"], layer.scores.detach(), rtol=1e-9, atol=1e-12
                )
            number += 1
    torch.testing.assert_close(ours.net[1].running_mean, theirs.net[1].running_mean)
    assert int(ours.net[1].num_batches_tracked) == 8
    plain, _, _ = scores_of(fit, plp.ScoreLearning(0.7), seed=5)
    assert not torch.allclose(plain.last["net.0.weight"].double(), watch.last["net.0.weight"], atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: plp.ScoreLearning(0.7),
        lambda: plp.ScoreLearning(0.7, plp.HARP(weight=1.0)),
        lambda: plp.ScoreLearning(0.7, plp.RLTH(), best="batch_loss"),
        lambda: plp.S2AP(0.7, gamma=0.05, warmup_epochs=0),
        lambda: plp.S2AP(0.7, gamma=0.05, warmup_epochs=1, perturbation="reuse", z_persistent=True),
        lambda: plp.S2AP(0.7, gamma=0.05, warmup_epochs=0, perturb="weights", normalize_update=True),
    ],
    ids=["hydra", "harp", "rlth", "s2ap", "reuse", "weights"],
)
@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_resumed_fit_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, make, step):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight, module = resumable_fit(make(), saver)
    path = tmp_path / f"step={step}.ckpt"
    torch.load(path, weights_only=True)
    again, resumed = resumable_fit(make(), ckpt_path=path)
    assert 0 < len(again.all) < len(straight.all) == 10
    assert same(again.last, straight.last)
    assert same(resumed.state_dict(), module.state_dict())
    assert again.callback.masks.digest() == straight.callback.masks.digest()


def resumable_fit(callback: plp.ScoreLearning, *others: Callback, ckpt_path=None) -> tuple[Watch, TinyModule]:
    watch, module = Watch(callback), Steady()
    module.validation_step = None
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(others),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, watch, *others],
    )
    trainer.fit(module, Loader(), ckpt_path=ckpt_path)
    return watch, module


def test_an_update_that_the_scaler_skips_leaves_the_network(fit):
    class Overflow(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.epoch_loop.batch_idx == 2:
                pl_module.net[0].weight.grad.fill_(float("inf"))

    callback = plp.S2AP(0.7, gamma=0.05, warmup_epochs=0)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    watch, module, _ = scores_of(fit, callback, Overflow(), plugins=[precision])
    assert same(watch.all[1], watch.all[2])
    assert not same(watch.all[2], watch.all[3])
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_adversarial_examples_are_made_once_for_both_passes(fit):
    class Counted(plp.TRADES):
        calls = 0

        def examples(self, model, *args):
            type(self).calls += 1
            assert not next(cb for cb in order if isinstance(cb, plp.S2AP)).scored.moved
            return super().examples(model, *args)

    class Images(TinyModule):
        def forward(self, x):
            return self.net(x)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].sigmoid(), batch[1]

    training = plp.AdversarialTraining(Counted(eps=0.1, step_size=0.05, steps=2))
    for how in ("gradient", "reuse"):
        s2ap = plp.S2AP(0.7, gamma=0.05, warmup_epochs=0, perturbation=how)
        for order in ((s2ap, training), (training, s2ap)):
            Counted.calls = 0
            fit(*order, module=Images())
            assert Counted.calls == 8


def test_the_best_scores_are_taken(fit, tmp_path):
    class Accuracy(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("val/robust_acc", [0.2, 0.6, 0.5][trainer.current_epoch])

    callback = plp.ScoreLearning(0.7, best="held_out")
    watch, module, _ = scores_of(fit, callback, Accuracy(), max_epochs=3, num_sanity_val_steps=0)
    assert same(watch.all[7], callback._kept["scores"])
    assert not same(watch.all[11], callback._kept["scores"])
    for name, mask in callback.masks.items():
        assert torch.equal(dict(module.named_parameters())[name] != 0, mask)
    assert int(module.net[1].num_batches_tracked) == 8
    with pytest.raises(plp.PruneError, match="Expected val/robust_acc"):
        fit(plp.ScoreLearning(0.7, best="held_out"))


def test_the_first_masks_are_of_the_largest_weights_and_exact(fit):
    seed_everything(3, verbose=False)
    module = TinyModule()
    layers = plp.Layerwise()(plp.score(module, plp.Magnitude(), select=SELECT), 0.7)
    callback = plp.ScoreLearning(0.7)
    fit(callback, module=module, max_steps=0)
    assert callback.masks.sparsity() == pytest.approx(layers.sparsity(), abs=1e-9)
    for name, mask in layers.items():
        kept = dict(module.named_parameters())[name] != 0
        assert abs(int(kept.sum()) - int(mask.sum())) <= 1
        assert int((kept & mask).sum()) >= int(mask.sum()) - 1


def test_what_cannot_be_learned_is_refused(fit):
    with pytest.raises(plp.PruneError, match="no averaging of weights"):
        fit(plp.ScoreLearning(0.7), EMAWeightAveraging())
    module = TinyModule()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(plp.PruneError, match="LBFGS"):
        fit(plp.ScoreLearning(0.7), module=module)
    module = TinyModule()
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[:4].parameters(), 0.1)
    with pytest.raises(plp.PruneError, match=r"found none for \['net.6.weight', 'net.9.weight'\]"):
        fit(plp.ScoreLearning(0.7), module=module)
    module = TinyModule()
    module.automatic_optimization = False
    with pytest.raises(plp.PruneError, match="Expected automatic optimization"):
        fit(plp.S2AP(0.7), module=module)
    with pytest.raises(plp.PruneError, match="one pruning callback for each parameter"):
        fit(plp.ScoreLearning(0.7), plp.PruneAtInit(plp.Magnitude()))

    class Streamed(TinyModule):
        def training_step(self, dataloader_iter):
            raise AssertionError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(plp.PruneError, match="takes dataloader_iter"):
            fit(plp.S2AP(0.7), module=Streamed())


def test_a_checkpoint_of_another_learner_or_without_scores_is_refused(fit, tmp_path):
    fit(plp.ScoreLearning(0.7), ModelCheckpoint(tmp_path / "a", filename="last"), enable_checkpointing=True)
    with pytest.raises(plp.PruneError, match="Expected the settings"):
        fit(plp.ScoreLearning(0.7, plp.HARP()), ckpt_path=tmp_path / "a" / "last.ckpt", max_epochs=3)
    fit(ModelCheckpoint(tmp_path / "b", filename="dense"), enable_checkpointing=True)
    with pytest.raises(plp.PruneError, match="Expected the masks of 'ScoreLearning'"):
        fit(plp.ScoreLearning(0.7), ckpt_path=tmp_path / "b" / "dense.ckpt", max_epochs=3)


def test_a_callback_pickles_and_lets_its_module_go(fit):
    callback = plp.S2AP(0.7, gamma=0.05, warmup_epochs=0)
    module, _ = fit(callback)
    copied = pickle.loads(pickle.dumps(callback))
    assert copied.masks.digest() == callback.masks.digest()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module.log = lambda *_: None
    module.training_step(next(iter(tiny_loader())), 0).backward()
    optimizer.step()
    assert any(not torch.equal(before[name], p) for name, p in module.named_parameters()), (
        "nothing holds the weights now"
    )


def test_scores_that_diverge_are_refused(fit):
    module = TinyModule()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1e38)
    with pytest.raises(plp.PruneError, match="Expected finite scores"):
        fit(plp.ScoreLearning(0.7), module=module)


def test_a_failing_step_leaves_the_pruned_network(fit):
    class Failing(TinyModule):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 3:
                raise RuntimeError("out of luck")

    callback, module = plp.S2AP(0.7, gamma=0.5, mode="scale", warmup_epochs=0), Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(callback, module=module)
    for name, mask in callback.masks.items():
        assert torch.equal(dict(module.named_parameters())[name] != 0, mask)


@pytest.mark.parametrize(
    "callback",
    [
        plp.ScoreLearning(0.7, best="batch_loss"),
        plp.S2AP(0.7, gamma=0.05, warmup_epochs=0),
        plp.S2AP(0.7, gamma=0.05, warmup_epochs=0, perturbation="reuse"),
    ],
    ids=["ScoreLearning", "S2AP", "reuse"],
)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returns_no_loss_moves_no_scores(fit, callback):
    class Skipping(TinyModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    module = Skipping()
    start = {name: callback.learner.begin(name, p.detach(), 0)[1] for name, p in SELECT(module).items()}
    watch, _, _ = scores_of(fit, callback, module=module)
    assert same(watch.all[0], start)
    assert not same(watch.all[1], start)


def test_a_fit_that_ends_with_the_warm_up_is_warned_of(fit):
    with pytest.warns(UserWarning, match="S2AP perturbs nothing: the fit has 2 epochs, and warmup_epochs is 5"):
        fit(plp.S2AP(0.7))
