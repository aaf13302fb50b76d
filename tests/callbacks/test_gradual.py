from __future__ import annotations

import pytest
import torch
from fake_module import TinyModule, tiny_loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.callbacks.bridge import Bridge

NAMES = ["net.0.weight", "net.3.weight", "net.6.weight"]


class Steady(TinyModule):
    """The same initial weights each time, and no randomness while it trains."""

    def __init__(self, optimizer="sgd"):
        torch.manual_seed(0)
        super().__init__(optimizer)
        self.net[7] = nn.Identity()


class Sparsities(Callback):
    """The measured sparsity of the weights each batch is trained with."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        weights = [pl_module.get_parameter(name) for name in NAMES]
        self.found.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))


def by_hand(schedule, epochs, rewind_to=None):
    """Gradual magnitude pruning written as a plain loop over the network of `Steady`."""
    module = Steady()
    optimizer = module.configure_optimizers()
    weights = [module.get_parameter(name) for name in NAMES]
    alive = torch.ones(sum(w.numel() for w in weights), dtype=torch.bool)
    loader, step, origin = tiny_loader(), 0, None

    def zero():
        for w, keep in zip(weights, alive.split([w.numel() for w in weights]), strict=True):
            w.data[~keep.view_as(w)] = 0
            if w.grad is not None:
                w.grad[~keep.view_as(w)] = 0

    def clear_momentum():
        for w, keep in zip(weights, alive.split([w.numel() for w in weights]), strict=True):
            if w in optimizer.state:
                optimizer.state[w]["momentum_buffer"][~keep.view_as(w)] = 0

    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            if step == rewind_to:
                origin = {name: t.clone() for name, t in module.state_dict().items()}
            if schedule.due(step) and schedule.sparsity(step) > 0:
                flat = torch.cat([w.detach().abs().flatten() for w in weights]).masked_fill(~alive, -1)
                keep = len(flat) - int(schedule.sparsity(step) * len(flat) + 0.5)
                alive = torch.zeros_like(alive)
                alive[flat.argsort(descending=True, stable=True)[:keep]] = True
                if origin is not None:
                    module.load_state_dict(origin)
                    optimizer.state.clear()
                clear_momentum()
                zero()
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            zero()
            optimizer.step()
            zero()
            step += 1
    return module


@pytest.mark.parametrize("rewind_to", [None, 0, 2])
@pytest.mark.parametrize(
    "schedule",
    [
        plp.Cubic(final=0.9, start=2, end=10, every=2),
        plp.Linear(final=0.5, start=3, end=9, every=3, initial=0.2),
        plp.Exponential(final=0.875, start=2, end=11, every=3),
        plp.OneShot(0.6, start=5),
    ],
    ids=lambda s: type(s).__name__,
)
def test_it_is_gradual_pruning_written_by_hand(fit, schedule, rewind_to):
    pruner = plp.GradualPruning(schedule=schedule, rewind_to=rewind_to)
    module, _ = fit(pruner, module=Steady(), max_epochs=3)
    for name, value in by_hand(schedule, 3, rewind_to).state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert plp.MaskSet.from_zeros({name: module.get_parameter(name) for name in NAMES}) == pruner.masks
    assert pruner.masks.counts() == plp.MaskSet(dict(pruner.masks)).counts()


@pytest.mark.parametrize("criterion", [plp.Magnitude(), plp.SNIP(), plp.FisherPruning(), plp.SynFlow(rounds=3)])
def test_every_step_has_the_sparsity_of_the_schedule(fit, criterion):
    schedule = plp.Cubic(final=0.8, start=1, end=6, every=2)
    watch = Sparsities()
    pruner = plp.GradualPruning(criterion, schedule)
    fit(pruner, watch, module=Steady())
    total = 8 * 9 + 8 * 8 * 9 + 72 * 16
    expected = [int(schedule.sparsity(step) * total + 0.5) / total for step in range(8)]
    assert watch.found == expected
    assert expected[-1] == 0.8


@pytest.mark.parametrize("criterion", [plp.SNIP(), plp.HutchinsonPruning(probes=1), plp.SynFlow(rounds=2)])
def test_scoring_while_training_leaves_no_trace(fit, criterion):
    class Scoring(plp.GradualPruning):
        scored = 0

        def _prune(self, bridge, masks):
            bridge.prune(self.criterion, self.allocation, 0.5, within=masks)
            self.scored += 1

    def trained(callback):
        torch.manual_seed(0)
        module, trainer = fit(callback, module=TinyModule("adamw"))  # with dropout, so random states show
        values = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
        return module.state_dict(), values, module.seen, torch.get_rng_state()

    scoring = Scoring(criterion, plp.Linear(final=0.5, start=0, end=7, every=1))
    found, expected = trained(scoring), trained(plp.Dense())
    assert scoring.scored == 8
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_accumulated_batches_and_skipped_steps_do_not_count(fit):
    class Overflow(Steady):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if self.trainer.global_step < 3 and self.trainer.training else 1.0)

    schedule = plp.OneShot(0.5, start=2)
    watch = Sparsities()
    fit(plp.GradualPruning(schedule=schedule), watch, module=Steady(), accumulate_grad_batches=2, max_epochs=3)
    assert watch.found == [0.0] * 4 + [0.5] * 8
    watch = Sparsities()
    scaler = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    fit(plp.GradualPruning(schedule=schedule), watch, module=Overflow(), plugins=[scaler], max_epochs=3)
    assert watch.found == [0.0] * 5 + [0.5] * 7


def test_zeros_that_are_there_do_not_come_back(fit, tmp_path):
    first = plp.PruneAtInit(sparsity=0.6)
    module, _ = fit(first, module=Steady())
    schedule = plp.Linear(final=0.9, end=6, every=2)
    watch = Sparsities()
    pruner = plp.GradualPruning(schedule=schedule, start_from="zeros")
    fit(pruner, watch, module=module)
    assert watch.found == [0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.9, 0.9]
    assert first.masks.intersect(pruner.masks) == pruner.masks
    dense = plp.GradualPruning(schedule=plp.OneShot(0.1, start=3))
    fit(dense, module=module)
    assert dense.masks.sparsity() == 0.1
    with expect_refusal("at most 0.5", "180", "start from 'dense'"):
        fit(
            plp.GradualPruning(schedule=plp.OneShot(0.5, start=3), start_from="zeros"),
            module=fit(plp.PruneAtInit(sparsity=0.9))[0],
        )


def test_averages_follow_masks_that_change(fit, tmp_path):
    class Look(Callback):
        seen = 0

        def on_validation_batch_start(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                self.seen += 1
                found = plp.MaskSet.from_zeros({n: pl_module.get_parameter(n) for n in NAMES})
                assert found == pruner.masks

    for start in (0, 3, 9):
        pruner, look = plp.GradualPruning(schedule=plp.Linear(final=0.8, start=1, end=8, every=2)), Look()
        average = EMAWeightAveraging(decay=0.7, update_starting_at_step=start)
        saved = ModelCheckpoint(tmp_path / str(start), save_last=True)
        module, _ = fit(pruner, average, look, saved, module=Steady(), enable_checkpointing=True, max_epochs=3)
        checkpoint = torch.load(tmp_path / str(start) / "last.ckpt", weights_only=True)
        for state in (module.state_dict(), checkpoint["state_dict"], checkpoint["current_model_state"]):
            assert plp.MaskSet.from_zeros({name: state[name] for name in NAMES}) == pruner.masks
        assert pruner.masks.sparsity() == 0.8
        assert look.seen == 3


def test_a_fit_too_short_for_its_schedule_is_refused(fit):
    with expect_refusal("at optimizer step 8", "found one of 8 steps", "Train longer"):
        fit(plp.GradualPruning(schedule=plp.Linear(final=0.9, end=8)))
    fit(plp.GradualPruning(schedule=plp.Linear(final=0.9, end=8)), fast_dev_run=True)
    pruner = plp.GradualPruning(schedule=plp.Linear(final=0.9, end=9, every=3))
    with pytest.warns(UserWarning, match=r"ended after 4 optimizer steps.*the sparsity is 0.3000, not 0.9"):
        module, _ = fit(pruner, Stop(4), max_epochs=3)
    fit(pruner, module=module, max_epochs=2)
    assert pruner.masks.sparsity() == 0.9
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2})  # with which nobody knows the number of steps
    with pytest.warns(UserWarning, match="ended after 6 optimizer steps"):
        fit(plp.GradualPruning(schedule=plp.Linear(final=0.9, end=7)), accumulation)


@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:.*[Ss]wapping scheduler")
def test_the_epoch_that_swa_adds_has_no_steps(fit):
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    with expect_refusal("at optimizer step 9", "found one of 8 steps"):
        fit(plp.GradualPruning(schedule=plp.Linear(final=0.9, end=9)), swa)
    pruner = plp.GradualPruning(schedule=plp.Linear(final=0.9, end=7))
    module, _ = fit(pruner, StochasticWeightAveraging(1e-2, swa_epoch_start=1))
    assert plp.MaskSet.from_zeros({name: module.get_parameter(name) for name in NAMES}) == pruner.masks
    assert pruner.masks.sparsity() == 0.9


class Stop(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.after


def test_the_best_checkpoint_may_be_of_a_denser_network_and_that_is_said(fit, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.warns(UserWarning, match="ModelCheckpoint keeps the best 'val/loss'"):
        fit(plp.GradualPruning(schedule=plp.Linear(final=0.9, end=6)), best, enable_checkpointing=True)


def test_layers_that_empty_are_named(fit):
    class Skewed(Steady):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.net[3].weight.mul_(1e-6)

    frozen_schedule = plp.OneShot(0.9, start=0)
    with pytest.warns(UserWarning, match=r"1 layers empty from sparsity 0.9000 on \(net.3.weight\)"):
        fit(plp.GradualPruning(schedule=frozen_schedule), module=Skewed(), max_epochs=1)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: plp.GradualPruning(schedule=0.9), ("schedule to be a Schedule", "Cubic")),
        (lambda: plp.GradualPruning(plp.Cubic(0.9)), ("criterion to be a Criterion",)),
        (lambda: plp.GradualPruning(rewind_to=-1), ("rewind_to", "found -1")),
        (lambda: plp.GradualPruning(rewind_to=0.5), ("rewind_to", "found 0.5")),
        (lambda: plp.GradualPruning(schedule=plp.OneShot(0.5, 2), rewind_to=3), ("rewind to, 3", "step 2")),
        (lambda: plp.GradualPruning(start_from="sparse"), ("'dense', 'zeros'",)),
        (lambda: plp.Cubic(0.9, start=5, end=5), ("after its start, 5", "found 5")),
        (lambda: plp.Cubic(0.9, initial=0.95), ("at most the final one, 0.9",)),
        (lambda: plp.Linear(0.9, every=0), ("schedule.every", "found 0")),
        (lambda: plp.Linear(0.9, end=1.5), ("whole number", "1.5")),
    ],
)
def test_wrong_arguments_are_named_at_once(make, parts):
    with expect_refusal(*parts):
        make()


@pytest.mark.filterwarnings("ignore:.*LearningRateFinder ends before", "ignore:.*lr_find", "ignore:Failed to compute")
@pytest.mark.parametrize("first", [True, False], ids=["pruner first", "finder first"])
def test_the_steps_of_a_tuner_do_not_count(fit, first):
    class Tunable(Steady):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    schedule = plp.Linear(final=0.8, start=1, end=6, every=2)
    pruner, finder, watch = (
        plp.GradualPruning(schedule=schedule),
        LearningRateFinder(num_training_steps=8),
        Sparsities(),
    )
    fit(*([pruner, finder] if first else [finder, pruner]), watch, module=Tunable())
    assert watch.found == [round(schedule.sparsity(step) * 1800) / 1800 for step in range(8)]


@pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:Checkpoint directory",
    "ignore:You're resuming from a checkpoint that ended",
)
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_change_that_fails_is_still_due_after_a_resume(fit, tmp_path, monkeypatch, error):
    def cb():
        return plp.GradualPruning(schedule=plp.Linear(final=0.8, start=2, end=6, every=4, initial=0.4))

    prune, saved = Bridge.prune, ModelCheckpoint(tmp_path, "broken", save_on_exception=True)
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return prune(self, *args, **kwargs)

    monkeypatch.setattr(Bridge, "prune", failing)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(cb(), saved, module=Steady(), enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    resumed = cb()
    fit(resumed, module=Steady(), ckpt_path=path)
    assert resumed.masks.sparsity() == 0.8


@pytest.mark.parametrize("averaged", [False, True])
def test_rewinding_keeps_the_zeros_of_another_callback(fit, averaged):
    one = plp.GradualPruning(
        schedule=plp.Linear(final=0.8, start=3, end=7, every=2, initial=0.2),
        select=plp.Select(include=["net.0"]),
        rewind_to=1,
        name="A",
    )
    two = plp.GradualPruning(schedule=plp.OneShot(0.9, start=2), select=plp.Select(exclude=["net.0"]), name="B")

    class Watch(Callback):
        seen = 0

        def on_train_batch_start(self, trainer, pl_module, *_):
            for callback in (one, two):
                for name, keep in callback.masks.items():
                    assert not bool(pl_module.get_parameter(name)[~keep].any())
                    self.seen += 1

    watch = Watch()
    module, _ = fit(one, two, *([EMAWeightAveraging(decay=0.9)] if averaged else []), watch, module=Steady())
    assert watch.seen == 8 * 3
    for callback, sparsity in ((one, 0.8), (two, 0.9)):
        found = plp.MaskSet.from_zeros({name: module.get_parameter(name) for name in callback.masks})
        assert found == callback.masks
        assert callback.masks.sparsity() == pytest.approx(sparsity, abs=0.01)


def test_an_average_starts_anew_where_the_network_is_rewound(fit):
    class Keep(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights.append(pl_module.net[6].weight.detach().clone())

    keep = Keep()
    pruner = plp.GradualPruning(schedule=plp.OneShot(0.5, start=5), rewind_to=0)
    module, _ = fit(pruner, keep, WeightAveraging(), module=Steady())
    torch.testing.assert_close(module.net[6].weight.detach(), torch.stack(keep.weights[5:]).mean(0))


def test_what_is_rewound_is_everything_and_is_forgotten_at_the_end(fit, tmp_path):
    class Counting(Steady):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def training_step(self, batch, batch_idx):
            self.count += 1
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.Adagrad(self.parameters(), 0.05, initial_accumulator_value=0.1)

    saved = ModelCheckpoint(tmp_path, save_last=True)
    pruner = plp.GradualPruning(schedule=plp.OneShot(0.5, start=5), rewind_to=2)
    module, _ = fit(pruner, saved, module=Counting(), enable_checkpointing=True)
    assert module.count == 2 + 3
    assert torch.load(tmp_path / "last.ckpt")["callbacks"]["GradualPruning"]["origin"] is None


def test_floors_that_cannot_hold_in_the_end_are_refused_at_the_start(fit):
    schedule = plp.Cubic(final=0.95, end=6, every=2)
    module = Steady()
    with expect_refusal("floors (min_keep_rows=20", "sparsity 0.95"):
        fit(plp.GradualPruning(schedule=schedule, allocation=plp.Global(min_keep_rows=20)), module=module)
    assert module.seen == []
