"""HESSO in a Lightning fit: exact counts, no trace of CRIC, and runs that can stop anywhere."""

from __future__ import annotations

import copy
import io
import logging
import sys
from pathlib import Path

import pytest
import torch
from fake_module import TinyModule, tiny_loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from refusal import expect_refusal
from torch import nn
from torch.optim.swa_utils import SWALR

import pl_prune as plp

sys.path.insert(0, str(Path(__file__).parent))
import hesso_job
from launch import launch
from test_resume import assert_same, run

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed"
)
STEPS = {"unit": "steps", "start": 2, "duration": 6, "periods": 3, "shrink_at_end": False}
TRIAL = plp.CRIC(sampling_steps=3, max_cycles=2)


def hesso(sparsity=0.5, **settings):
    return plp.HESSO(sparsity, **{**STEPS, **settings})


def state_of(module, trainer):
    """Return all that a fit ends with."""
    state = {name: t.clone() for name, t in module.state_dict().items()}
    for i, values in enumerate(v for o in trainer.optimizers for v in o.state.values()):
        state.update({f"{i} {key}": torch.as_tensor(v).clone() for key, v in values.items()})
    return state


def zero_units(module, groups):
    """Return the number of units of which every slice is zero, counted in the weights themselves."""
    return sum(
        int((~k).sum()) for k in groups.collapse(plp.MaskSet.from_zeros(dict(module.named_parameters()))).values()
    )


class Watch(Callback):
    """Counts units that are zero after every batch, and in every validation."""

    def __init__(self, pruner):
        self.pruner, self.counts, self.sparsities, self.validated = pruner, [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.counts.append(zero_units(pl_module, self.pruner.groups))
        self.sparsities.append(self.pruner.masks.sparsity())
        assert self.counts[-1] == int((self.pruner.hesso.status == 2).sum())

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(zero_units(pl_module, self.pruner.groups))


class Manual(TinyModule):
    """Two optimizers, stepped in turn by hand."""

    def __init__(self, split=False):
        super().__init__()
        self.automatic_optimization = False
        self.split = split

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        cut = 1 if self.split else 6
        parts = list(self.net[:cut].parameters()), list(self.net[cut:].parameters())
        return torch.optim.SGD(parts[0], 0.1, momentum=0.9, weight_decay=1e-3), torch.optim.AdamW(parts[1], 1e-2)


class Scheduled(TinyModule):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


FITS = {
    "SGD": (lambda: TinyModule(), {}),
    "AdamW, clipped": (lambda: TinyModule("adamw"), {"gradient_clip_val": 0.1}),
    "accumulated": (lambda: TinyModule(), {"accumulate_grad_batches": 2, "max_epochs": 6}),
    "bfloat16": (lambda: TinyModule(), {"precision": "bf16-mixed"}),
    "scheduled": (lambda: Scheduled(), {}),
    "two optimizers by hand": (lambda: Manual(), {}),
}


@pytest.mark.parametrize(("make", "settings"), FITS.values(), ids=FITS)
def test_the_count_is_exact_after_every_period_and_stays(fit, make, settings):
    pruner = hesso()
    watch = Watch(pruner)
    _, trainer = fit(pruner, watch, module=make(), **{"max_epochs": 3, **settings})
    each = settings.get("accumulate_grad_batches", 1)
    by_step = watch.counts[each - 1 :: each]
    assert by_step[:9] == [0, 0, 0, 5, 5, 10, 10, 16, 16]
    assert set(by_step[8:]) == {16}
    assert len(by_step) == 12
    assert pruner.masks.sparsity() == watch.sparsities[-1] > 0.3
    assert watch.validated == [watch.counts[i] for i in range(3, len(watch.counts), 4)]
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)


@pytest.mark.parametrize("settings", [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_target_of_zero_is_the_dense_run_bit_for_bit(fit, optimizer, settings):
    dense = state_of(*fit(plp.Dense(), module=_seeded(optimizer), **settings))
    assert_same(state_of(*fit(hesso(0.0, duration=2, periods=2), module=_seeded(optimizer), **settings)), dense)


def _seeded(optimizer="sgd"):
    torch.manual_seed(0)
    return TinyModule(optimizer)


def test_nothing_changes_before_the_start(fit):
    class First(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 2:
                self.state = state_of(module, trainer)

    seen = First(), First()
    fit(plp.Dense(), seen[0], module=_seeded())
    fit(hesso(), seen[1], module=_seeded())
    assert_same(seen[0].state, seen[1].state)


class Snapshots(Callback):
    """Takes what a checkpoint would hold after every batch, and what lies in the weights while one runs."""

    def __init__(self, pruner):
        self.pruner, self.after, self.during, self.on_trial = pruner, [], [], []

    def on_before_backward(self, trainer, module, loss):
        self.on_trial.append(self.pruner.hesso.walk is not None)
        self.during.append([
            {n: t.clone() for n, t in module.named_parameters()},
            trainer._checkpoint_connector.dump_checkpoint(),
        ])

    def on_train_batch_end(self, trainer, module, *_):
        self.after.append(state_of(module, trainer))


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "max_epochs": 8}], ids=["", "accumulated"])
@pytest.mark.parametrize("average", [None, "before", "after"])
def test_cric_leaves_no_trace(fit, settings, average):
    pruner = hesso(cric=TRIAL)
    watch = Snapshots(pruner)
    ema = EMAWeightAveraging(decay=0.5)
    callbacks = {None: [pruner], "before": [ema, pruner], "after": [pruner, ema]}[average]
    each = settings.get("accumulate_grad_batches", 1)
    fit(*callbacks, watch, module=_seeded("adamw"), **{"max_epochs": 4, **settings})
    first = watch.on_trial.index(True)
    last = len(watch.on_trial) - watch.on_trial[::-1].index(True)
    assert first == 2 * each
    assert last - first in (3 * each, 6 * each)
    for i in range(first, last):
        assert_same(watch.after[i], watch.after[first - 1])
        saved = watch.during[i][1]
        saved = saved.get("current_model_state", saved["state_dict"])
        for name, value in saved.items():
            assert torch.equal(value, watch.after[first - 1][name]), name
    moved = watch.during[first + each][0]
    assert any(not torch.equal(p, watch.after[first - 1][n]) for n, p in moved.items())
    assert any(not torch.equal(watch.after[last + each - 1][n], watch.after[last - 1][n]) for n in moved)
    assert sum(int((~k).sum()) for k in pruner.groups.collapse(pruner.masks).values()) == 16


@pytest.mark.parametrize("name", ["hesso", "cric"])
def test_a_run_resumed_after_any_step_is_the_run_that_was_not(tmp_path, name):
    def pruner():
        return hesso(duration=7, cric=TRIAL if name == "cric" else None)

    whole = run(tmp_path, pruner())
    for step in range(1, 15):
        resumed = run(tmp_path / "again", pruner(), ckpt_path=tmp_path / f"step={step}.ckpt", every=100)
        assert_same(resumed[0], whole[0])
        assert resumed[1] == whole[1]
    assert whole[1].sparsity() > 0.3


def test_two_ranks_choose_as_one_process_does(tmp_path):
    launch([Path(__file__).with_name("hesso_job.py"), tmp_path, 2])
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for name in hesso_job.PRUNERS:
        module, pruner = hesso_job.train(str(tmp_path), 1, name)
        for rank in ranks:
            assert plp.MaskSet.from_state_dict(rank[name]["masks"]) == pruner.masks
            for key, value in module.state_dict().items():
                torch.testing.assert_close(rank[name]["weights"][key], value, rtol=1e-3, atol=1e-5)
                assert torch.equal(rank[name]["weights"][key], ranks[0][name]["weights"][key])
        assert zero_units(module, pruner.groups) == sum(pruner.groups.sizes.values()) // 2


@pytest.mark.parametrize("average", ["EMA", "mean", "SWA"])
@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:.*[Ss]wapping scheduler")
def test_averages_are_as_sparse_as_the_weights(fit, tmp_path, average):
    averaging = {
        "EMA": lambda: EMAWeightAveraging(decay=0.8),
        "mean": lambda: WeightAveraging(),
        "SWA": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    }[average]()
    pruner = hesso()
    module, _ = fit(
        pruner, averaging, ModelCheckpoint(tmp_path, save_last=True), max_epochs=4, enable_checkpointing=True
    )
    assert zero_units(module, pruner.groups) == 16
    swa = isinstance(averaging, StochasticWeightAveraging)
    with torch.serialization.safe_globals([getattr, SWALR] * swa):  # older torch keeps a function of its scheduler
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for state in (saved["state_dict"], saved.get("current_model_state", saved["state_dict"])):
        keep = pruner.groups.collapse(plp.MaskSet.from_zeros({n: t for n, t in state.items() if n in pruner.masks}))
        assert sum(int((~k).sum()) for k in keep.values()) == 16


class Overflow(MixedPrecision):
    """Makes the gradients of some steps infinite, as a loss scale that is too large does."""

    def __init__(self, at):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        self.at, self.call = at, 0

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        self.call += 1
        if self.call in self.at:
            inner = closure

            def closure():
                value = inner()
                model.net[9].bias.grad.fill_(torch.inf)  # of no unit
                model.net[3].weight.grad[0, 0, 0, 0] = torch.inf
                return value

        return super().optimizer_step(optimizer, model, closure, **kwargs)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_steps_that_overflow_do_not_count(fit):
    pruner = hesso()
    watch = Watch(pruner)
    fit(pruner, watch, max_epochs=3, plugins=[Overflow({3, 5})])
    assert watch.counts[:11] == [0, 0, 0, 0, 0, 5, 5, 10, 10, 16, 16]
    assert pruner._kept["steps"] == 10


def test_the_smaller_network_is_written_and_computes_the_same(fit, tmp_path):
    pruner = hesso(shrink_at_end=True)
    module, _ = fit(pruner, module=_seeded(), max_epochs=3)
    small = plp.load_shrunk(TinyModule(), tmp_path / "small.safetensors")
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(small.eval()(x), module.eval()(x))
    assert sum(p.numel() for p in small.parameters()) == pruner.groups.cost(pruner.groups.collapse(pruner.masks))[0]


def test_progress_is_logged_and_a_table_is_shown(fit, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(hesso(), max_epochs=3, logger=CSVLogger(tmp_path, "log", "0"), log_every_n_steps=1)
    rows = [dict(zip(*pair, strict=True)) for pair in _csv(tmp_path / "log" / "0" / "metrics.csv")]
    logged = {int(row["step"]): row for row in rows if row.get("group_sparsity")}
    assert [float(logged[s]["group_sparsity"]) for s in range(2, 8)] == pytest.approx([
        0,
        5 / 32,
        5 / 32,
        10 / 32,
        10 / 32,
        0.5,
    ])
    assert [float(logged[s]["hesso/norm_left"]) for s in range(2, 8)] == pytest.approx([0.5, 0, 0.5, 0, 0.5, 0])
    assert [float(logged[s]["hesso/units_shrinking"]) for s in range(2, 8)] == [5, 0, 5, 0, 6, 0]
    assert 0 < float(logged[2]["hesso/saliency_chosen"]) < 5 / 32
    shrinking = [float(logged[s]["hesso/saliency_shrinking"]) for s in range(2, 8)]
    assert shrinking[0] == pytest.approx(float(logged[2]["hesso/saliency_chosen"]))
    assert [share > 0 for share in shrinking] == [True, False] * 3
    params = [float(logged[s]["hesso/params"]) for s in (2, 3, 5, 7)]
    assert params == sorted(params, reverse=True)
    assert "32 units in 3 groups" in caplog.text


def _csv(path):
    lines = [line.split(",") for line in path.read_text().splitlines()]
    return [(lines[0], line) for line in lines[1:]]


@pytest.mark.parametrize(
    "settings",
    [
        {"saliency": plp.Saliency("random")},
        {"saliency": plp.Saliency("cosine", "paper")},
        {"saliency": plp.Saliency(preset="oto")},
        {"projection": "one_shot"},
        {"exclude": ["net.0"]},
        {"min_keep": 3},
    ],
    ids=str,
)
def test_controls_take_one_argument_each(fit, settings):
    pruner = hesso(**settings)
    watch = Watch(pruner)
    fit(pruner, watch, max_epochs=3)
    units = sum(pruner.groups.sizes.values())
    assert watch.counts[-1] == units // 2
    if "projection" in settings:
        assert watch.counts[:4] == [0, 0, 16, 16]
    if "exclude" in settings:
        assert "net.0" not in pruner.groups.sizes
    if "min_keep" in settings:
        assert min(int(k.sum()) for k in pruner.groups.collapse(pruner.masks).values()) >= 3


@pytest.mark.parametrize("target", ["target_params", "target_macs"])
def test_parameters_and_macs_are_counted_after_slicing(fit, target):
    pruner = plp.HESSO(**{target: 0.4}, **STEPS)
    fit(pruner, max_epochs=3)
    left = pruner.groups.cost(pruner.groups.collapse(pruner.masks))[target == "target_macs"]
    whole = pruner.groups.cost({})[target == "target_macs"]
    assert 0.5 * whole < left <= 0.6 * whole


def test_random_units_are_those_of_the_runs_seed(fit):
    chosen = []
    for seed in (3, 3, 4):
        pruner = hesso(saliency=plp.Saliency("random"))
        fit(pruner, seed=seed)
        chosen.append(pruner.masks)
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_fractions_are_of_the_steps_of_the_fit(fit):
    pruner = plp.HESSO(0.5, start=0.25, duration=0.25, periods=2, shrink_at_end=False)
    watch = Watch(pruner)
    fit(pruner, watch, max_epochs=4)
    assert watch.counts[3:9] == [0, 0, 8, 8, 16, 16]


def test_a_second_fit_goes_on_with_the_zeros(fit):
    pruner = hesso()
    module, trainer = fit(pruner, max_epochs=2)
    masks = pruner.masks
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, tiny_loader(), tiny_loader(16))
    assert pruner.masks == masks
    assert zero_units(module, pruner.groups) == 16
    assert pruner._kept["steps"] == 12


def test_a_callback_can_be_copied_and_its_state_read_without_pickle(fit):
    pruner = hesso(cric=TRIAL)
    fit(pruner, max_epochs=4)
    again = copy.deepcopy(pruner)
    assert again.masks == pruner.masks
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["hesso"]["steps"] == pruner._kept["steps"]


def test_a_low_learning_rate_at_the_end_of_pruning_is_warned_of(fit):
    class Decayed(TinyModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], 0.01)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    with pytest.warns(UserWarning, match=r"learning rate is 0.001 .* 0.1 at its peak"):
        fit(hesso(), module=Decayed(), max_epochs=3)


def test_a_trial_that_may_take_more_than_half_of_the_fit_is_warned_of(fit):
    with pytest.warns(UserWarning, match="CRIC may take 8 of the 12 optimizer steps"):
        fit(hesso(duration=2, cric=plp.CRIC(4, tolerance=14)), max_epochs=3)


def test_the_best_checkpoint_may_be_a_dense_one_and_a_fit_may_stop_early(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.warns(UserWarning, match="not yet pruned to the end"):
        fit(hesso(), saver, enable_checkpointing=True)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 5

    with pytest.warns(UserWarning, match="before the last unit was zero"):
        fit(hesso(), Stop())


def test_what_cannot_be_is_refused_before_the_first_step(fit, tmp_path):
    class NoStep(Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError

    def refused(pruner, *parts, module=None, **settings):
        with expect_refusal(*parts):
            fit(pruner, NoStep(), module=module, **settings)

    refused(hesso(start=3), "goes on until the last unit is zero, 9 optimizer steps", "found one of 8 steps")
    refused(hesso(cric=TRIAL, duration=4), "9 optimizer steps from here (at least 3 of them CRIC's)")
    refused(plp.HESSO(0.5), "at least one optimizer step in each of 10 periods", "found 1 in all")
    refused(hesso(0.99), "at most 29 of 32")
    refused(hesso(min_keep=6), "min_keep=6 in each of 3 groups")
    refused(hesso(include=["net.9"]), "an output layer", "leave it out")
    refused(hesso(), "one optimizer for all parameters of a unit of 'net.0'", module=Manual(split=True))
    refused(hesso(cric=TRIAL), "automatic optimization with CRIC", module=Manual())
    frozen = TinyModule()
    frozen.net[:7].requires_grad_(False)
    refused(hesso(), "at least one layer whose units can leave", "is frozen", module=frozen)
    with expect_refusal("one pruning callback for each parameter"):
        fit(hesso(), plp.GradualPruning(schedule=plp.Cubic(final=0.5, end=4)))
    refused(plp.HESSO(0.5), "training run of known length", max_epochs=-1)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({}, "one of target_group_sparsity"),
        ({"target_group_sparsity": 0.5, "target_macs": 0.5}, "found 2"),
        ({"target_group_sparsity": 1.0}, "[0, 1)"),
        ({"target_group_sparsity": 0.5, "start": 0.95}, "fractions of the fit"),
        ({"target_group_sparsity": 0.5, "start": 0.5, "unit": "steps"}, "whole numbers of steps"),
        ({"target_group_sparsity": 0.5, "duration": 0}, "duration above 0"),
        ({"target_group_sparsity": 0.5, "start": float("nan")}, "found start=nan"),
        ({"target_group_sparsity": 0.5, "duration": "0.1"}, "duration='0.1'"),
        ({"target_group_sparsity": 0.5, "periods": 0}, "periods"),
        ({"target_group_sparsity": 0.5, "saliency": "taylor1"}, "pl_prune.Saliency('taylor1')"),
        ({"target_group_sparsity": 0.5, "cric": True}, "pl_prune.CRIC()"),
        ({"target_group_sparsity": 0.5, "projection": "hard"}, "projection"),
        ({"target_group_sparsity": 0.5, "exclude": "net.0"}, "exclude to be a list"),
    ],
    ids=str,
)
def test_arguments_are_checked(settings, part):
    with expect_refusal(part):
        plp.HESSO(**settings)
