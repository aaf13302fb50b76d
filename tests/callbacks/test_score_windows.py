"""What a hostile reader found in score learning and AWP: networks that stay moved, states that are lost, and numbers that diverge."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from fake_module import TinyModule
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

import pl_prune as plp
from pl_prune.adversarial.perturb import perturbation

MOVERS = {
    "S2AP": lambda: [plp.S2AP(0.7, gamma=0.5, mode="scale", warmup_epochs=0)],
    "weights": lambda: [plp.S2AP(0.7, gamma=0.5, mode="scale", warmup_epochs=0, perturb="weights")],
    "channels": lambda: [
        plp.S2AP(0.4, gamma=0.5, mode="scale", warmup_epochs=0, channels=plp.Channels(shrink_at_end=False))
    ],
    "AWP": lambda: [plp.AWP(0.5, "scale")],
}


def still(module: TinyModule | None = None) -> TinyModule:
    """A network that no step changes, so that whatever differs is a move that was not taken back."""
    module = module or TinyModule()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    return module


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Between(Callback):
    """Collect the weights that others see after each batch, and those within it."""

    def __init__(self) -> None:
        self.after, self.within = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.within.append(weights(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append(weights(pl_module))


def same(one, two) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", MOVERS)
def test_between_the_batches_of_a_window_the_network_is_not_moved_and_within_it_moves_alike(fit, tmp_path, kind):
    class Weights(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)

    seen = Between()
    module, _ = fit(
        *MOVERS[kind](), seen, Weights(), module=still(), accumulate_grad_batches=4, max_epochs=1, val_check_interval=2
    )
    assert len(seen.after) == 4
    assert all(same(found, seen.after[0]) for found in seen.after)
    assert all(same(found, seen.within[0]) for found in seen.within)
    assert not same(seen.after[0], seen.within[0])
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in seen.after[0].items())
    if kind != "channels":
        assert same(weights(module), seen.after[0])


@pytest.mark.parametrize("kind", MOVERS)
def test_an_epoch_or_a_fit_that_ends_early_leaves_the_network_that_is_not_moved(fit, kind):
    class Short(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 1

    for module, more in ((Short(), []), (TinyModule(), [Stop()])):
        movers = MOVERS[kind]()
        module, _ = fit(
            *movers, *more, module=still(module), accumulate_grad_batches=3, max_epochs=1, limit_val_batches=0
        )
        masks = getattr(movers[0], "masks", None) or {}
        for name, mask in masks.items():
            assert not dict(module.named_parameters())[name][~mask].any(), name
        if kind == "AWP":
            continue
        kept = movers[0]._kept["weights"]
        for name, w0 in kept.items():
            p = dict(module.named_parameters())[name].detach()
            assert torch.equal(p[p != 0], w0[p != 0]), name


def test_tied_parameters_are_saved_under_all_their_names(fit, tmp_path):
    class Tied(TinyModule):
        def __init__(self):
            super().__init__()
            self.alias = self.net[6]

    class Save(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    for kind in ("S2AP", "AWP"):
        fit(*MOVERS[kind](), Save(), module=still(Tied()), max_steps=1, max_epochs=1)
        state = torch.load(tmp_path / "within.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(state["alias.weight"], state["net.6.weight"]), kind


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("channels", [None, plp.Channels()], ids=["weights", "channels"])
def test_a_run_that_dies_when_it_has_trained_ends_as_an_undisturbed_one(fit, tmp_path, channels):
    class Accuracy(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("val/robust_acc", [0.6, 0.2][trainer.current_epoch])

    class Dies(Callback):
        def on_train_end(self, trainer, pl_module):
            raise RuntimeError("out of power")

    def run(*more, version, **settings):
        callback = plp.ScoreLearning(0.5, best="held_out", channels=channels)
        logger = CSVLogger(tmp_path, name="runs", version=version)
        settings = {"num_sanity_val_steps": 0, "logger": logger, "enable_checkpointing": True, **settings}
        module, _ = fit(*more, callback, Accuracy(), ModelCheckpoint(save_last=True), **settings)
        return callback, module

    undisturbed, module = run(version="whole")
    with pytest.raises(RuntimeError, match="out of power"):
        run(Dies(), version="dies")
    resumed, again = run(version="again", ckpt_path=tmp_path / "runs" / "dies" / "checkpoints" / "last.ckpt")
    assert undisturbed.masks.digest() == resumed.masks.digest()
    assert same(weights(module), weights(again))
    one, two = (
        torch.load(tmp_path / "runs" / v / "best.ckpt", weights_only=True)["state_dict"] for v in ("whole", "again")
    )
    assert same(one, two)
    assert (tmp_path / "runs" / "again" / "small.safetensors").exists() == (channels is not None)


def test_both_passes_draw_the_same_numbers_and_leave_lists_alone(fit):
    class Mixed(TinyModule):
        def __init__(self):
            super().__init__()
            self.draws, self.store = [], {"losses": []}

        def training_step(self, batch, batch_idx):
            DRAWS.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            self.store["losses"].append(batch_idx)
            return super().training_step(batch, batch_idx)

    for kind in ("S2AP", "AWP"):
        DRAWS.clear()
        module, _ = fit(*MOVERS[kind](), module=Mixed(), max_epochs=1)
        assert DRAWS[::2] == DRAWS[1::2]
        assert len(DRAWS) == 8
        assert module.store["losses"] == [0, 1, 2, 3]


DRAWS: list[tuple[float, float, float]] = []


def test_the_best_batch_is_that_of_the_scores_it_was_computed_with(fit):
    class Losses(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss - loss.detach() + [float("inf"), 5.0, 1.0, 3.0][batch_idx]

    class Scores(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            self.all = [*getattr(self, "all", []), {n: s.clone() for n, s in callback.scored.scores.items()}]

    callback, scores = plp.ScoreLearning(0.7, best="batch_loss"), Scores()
    fit(callback, scores, module=Losses(), max_epochs=1)
    assert same(scores.all[2], callback._kept["scores"])
    assert not same(scores.all[3], callback._kept["scores"])


def test_a_second_fit_goes_on_or_begins_anew_where_weights_were_loaded(fit):
    callback = plp.ScoreLearning(0.7)
    module, _ = fit(callback, max_epochs=1)
    scores = {name: s.clone() for name, s in callback._kept["scores"].items()}
    fit(callback, module=module, max_epochs=0)
    assert same(scores, callback._kept["scores"])
    other = TinyModule()
    module.load_state_dict(other.state_dict())
    fit(callback, module=module, max_epochs=0)
    for name, w0 in callback._kept["weights"].items():
        assert torch.equal(w0, dict(other.named_parameters())[name]), name


def test_a_fit_that_has_ended_in_channels_is_not_resumed(fit, tmp_path):
    callback = plp.ScoreLearning(0.5, channels=plp.Channels(shrink_at_end=False))
    _, trainer = fit(callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    with pytest.raises(plp.PruneError, match="from within the fit"):
        fit(
            plp.ScoreLearning(0.5, channels=plp.Channels(shrink_at_end=False)),
            ckpt_path=tmp_path / "ended.ckpt",
            max_epochs=2,
        )


def test_a_layer_without_gradient_is_not_moved_however_long_it_is():
    z = perturbation(
        {"a": torch.zeros(3), "b": torch.ones(2)}, {"a": torch.full((3,), 1e6), "b": torch.ones(2)}, 1.0, "scale"
    )
    assert torch.equal(z["a"], torch.zeros(3))
    assert torch.isfinite(z["b"]).all()


def test_memory_between_steps_is_nine_bytes_a_weight(fit):
    class Held(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.bytes = size_of(callback)

    for callback, limit in (
        (plp.S2AP(0.7, gamma=0.1, warmup_epochs=0), 9),
        (plp.S2AP(0.7, gamma=0.1, warmup_epochs=0, perturbation="reuse"), 13),
    ):
        held = Held()
        fit(callback, held, max_epochs=1)
        assert held.bytes == limit * 1864


def size_of(holder: object) -> int:
    """Bytes of every tensor that an object of ours holds, however deep, the module's own left out."""
    found: dict[int, int] = {}
    todo, seen = [vars(holder)], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            found[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            todo += [
                item
                for key, item in value.items()
                if key not in ("_bridge", "params", "_params", "_frozen", "_handles")
            ]
        elif isinstance(value, (list, tuple)):
            todo += list(value)
        elif type(value).__module__.startswith("pl_prune"):
            todo.append(vars(value) if hasattr(value, "__dict__") else {})
    return sum(found.values())


def test_what_would_move_or_scale_weights_besides_is_refused(fit):
    for pruner in (plp.HESSO(0.5, unit="steps", start=1, duration=2, periods=1),):
        for order in ((pruner, plp.AWP()), (plp.AWP(), pruner)):
            with pytest.raises(plp.PruneError, match="found HESSO"):
                fit(*order)
    with pytest.raises(plp.PruneError, match="found it, and it renews"):
        fit(plp.AWP(), StochasticWeightAveraging(1e-2))
    module = TinyModule()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1, fused=True)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(plp.PruneError, match="fused SGD under a"):
        fit(plp.ScoreLearning(0.7, plp.HARP()), module=module, plugins=[precision])
    with pytest.raises(plp.PruneError, match="z_persistent with mode='project'"):
        plp.S2AP(mode="scale", z_persistent=True)
    with pytest.raises(plp.PruneError, match="Expected select"):
        plp.ScoreLearning(select=None)
    with pytest.raises(plp.PruneError, match="Expected least"):
        plp.HARP(least="a")


def test_a_layer_that_is_frozen_in_mid_run_is_left_out_of_the_perturbation(fit):
    class Freeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net[0].weight.requires_grad_(batch_idx < 2)

    for kind in ("S2AP", "AWP"):
        module, _ = fit(Freeze(), *MOVERS[kind](), max_epochs=1)
        assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("kind", MOVERS)
def test_mixed_precision_moves_and_puts_back_alike(fit, kind):
    seen = Between()
    module, _ = fit(*MOVERS[kind](), seen, module=still(), precision="bf16-mixed", max_epochs=1)
    assert all(same(found, seen.after[0]) for found in seen.after)
    assert not any(same(found, seen.after[0]) for found in seen.within)
    assert all(p.dtype == torch.float32 for p in module.parameters())


class Two(TinyModule):
    """Steps the first layers and the others by optimizers of their own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[:6].parameters(), 0.1), torch.optim.SGD(self.net[6:].parameters(), 0.1)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()


def test_several_optimizers_step_scores_of_weights_and_no_others(fit):
    callback = plp.ScoreLearning(0.7)
    module, _ = fit(callback, module=Two(), max_epochs=1)
    begun = {name: plp.HYDRA().begin(name, w0, 0)[1] for name, w0 in callback._kept["weights"].items()}
    assert not any(torch.equal(s, begun[name]) for name, s in callback._kept["scores"].items())
    for name, mask in callback.masks.items():
        assert torch.equal(dict(module.named_parameters())[name] != 0, mask)
    with pytest.raises(plp.PruneError, match="one optimizer for all parameters that have scores; found 2"):
        fit(plp.S2AP(0.7, warmup_epochs=0, perturbation="reuse"), module=Two(), max_epochs=1)


def test_best_that_nobody_measures_is_warned_of(fit):
    with pytest.warns(UserWarning, match="nobody measured what best='held_out' decides by"):
        fit(plp.ScoreLearning(0.7, best="held_out"), max_epochs=1, limit_val_batches=0)
