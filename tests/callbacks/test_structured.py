"""Structured pruning before the fit: really smaller, or masked."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_module import TinyModule, tiny_data, tiny_loader
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.callbacks.cutting import refuse_cut

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
MAGNITUDE = plp.ByGroup(plp.Magnitude(), "l2")
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:Checkpoint directory", "ignore:.*num_workers"
)
SAMPLES = plp.Samples(per_class=4)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Steady(TinyModule):
    """No randomness while it trains."""

    def __init__(self, optimizer="sgd"):
        torch.manual_seed(0)
        super().__init__(optimizer)
        self.net[7] = nn.Identity()


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def sizes(module):
    return {n: tuple(p.shape) for n, p in module.named_parameters()}


class AtStart(Callback):
    """What the network is when the first batch comes."""

    def on_train_start(self, trainer, pl_module):
        self.copy = copy.deepcopy(pl_module).eval()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}], ids=str)
def test_masked_units_stay_zero_and_shrink_afterwards_without_a_change(fit, optimizer, settings):
    pruner = plp.StructuredPruning(plp.PROscore(), 0.5, shrink=False, samples=SAMPLES)
    zeros = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            live = dict(pl_module.named_parameters())
            zeros.append(all(bool((live[n][~m] == 0).all()) for n, m in pruner.masks.items()))

    module, _ = fit(pruner, Look(), module=Steady(optimizer), **settings)
    assert zeros == [True] * 8
    keep = pruner.groups.collapse(pruner.masks)
    assert sum(int(m.sum()) for m in keep.values()) == sum(pruner.groups.sizes.values()) // 2
    module.eval()
    x = torch.randn(3, 1, 8, 8)
    small = plp.shrink(module, pruner.masks, x, pruner.groups)
    torch.testing.assert_close(small(x), module(x))
    params, _ = pruner.groups.cost(keep)
    assert sum(p.numel() for p in small.parameters()) == params < sum(p.numel() for p in module.parameters())


def test_the_network_is_cut_before_the_fit_as_the_python_interface_would():
    module, start = Steady(), AtStart()
    expected = copy.deepcopy(module)
    pruner = plp.StructuredPruning(plp.Taylor(), 0.5, samples=plp.Samples(total=64), bn_warmup="never")
    Trainer(max_epochs=1, callbacks=[pruner, start], **QUIET).fit(module, tiny_loader())
    x, y = tiny_data().tensors
    groups = plp.trace_groups(expected, x[:2])
    keep = plp.select_units(plp.score_groups(expected, plp.Taylor(), groups, [(x, y)], loss), groups, 0.5)
    small = plp.shrink(expected, groups.expand(keep), x[:2], groups)
    assert_same(state(start.copy), state(small))
    assert sizes(module) == sizes(small) != sizes(expected)
    assert not torch.equal(module.net[0].weight, small.net[0].weight)  # it has learned
    torch.testing.assert_close(start.copy(x), small.eval()(x))
    assert module.net[0].out_channels == len(module.net[0].weight)


def test_the_cut_network_trains_as_if_it_had_been_built_so():
    """Same start, same batches, same optimizer: the same weights, bit for bit."""
    module, start = Steady(), AtStart()
    pruner = plp.StructuredPruning(MAGNITUDE, 0.5)
    Trainer(max_epochs=2, callbacks=[pruner, start], **QUIET).fit(module, tiny_loader())
    by_hand = start.copy.train()
    Trainer(max_epochs=2, **QUIET).fit(by_hand, tiny_loader())
    assert_same(state(module), state(by_hand))


class Bound(Steady):
    """Its optimizer is built before any trainer, as LightningCLI does."""

    def __init__(self, kind=torch.optim.SGD):
        super().__init__()
        self.built = [kind(self.parameters(), lr=0.05)]

    def configure_optimizers(self):
        return self.built[0]


def test_what_is_left_after_a_fit_is_saved_and_loaded_into_a_module_built_anew(tmp_path):
    module, pruner = Steady(), plp.StructuredPruning(MAGNITUDE, 0.5)
    Trainer(max_epochs=1, callbacks=[pruner], **QUIET).fit(module, tiny_loader())
    x = torch.randn(3, 1, 8, 8)
    path = plp.save_shrunk(module, tmp_path / "small")
    again = plp.load_shrunk(Steady(), path)
    assert sizes(again) == sizes(module) != sizes(Steady())
    assert torch.equal(again.eval()(x), module.eval()(x))
    groups = plp.trace_groups(module, x)
    keep = {root: torch.arange(size) > 0 for root, size in groups.sizes.items()}
    smaller = plp.shrink(module, groups.expand(keep), x, groups)  # cuts of cuts
    path = plp.save_shrunk(smaller, tmp_path / "smaller")
    assert torch.equal(plp.load_shrunk(Steady(), path).eval()(x), smaller.eval()(x))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_that_was_built_on_the_whole_network_steps_the_cut_one(kind):
    module, start = Bound(kind), AtStart()
    before = {n: id(p) for n, p in module.named_parameters()}
    pruner = plp.StructuredPruning(MAGNITUDE, 0.5)
    Trainer(max_epochs=1, callbacks=[pruner, start], **QUIET).fit(module, tiny_loader())
    assert {n: id(p) for n, p in module.named_parameters()} == before
    fresh, begun = start.copy.train(), start.copy.net[3].weight.clone()
    fresh.built[0] = kind(fresh.parameters(), lr=0.05)
    Trainer(max_epochs=1, **QUIET).fit(fresh, tiny_loader())
    assert_same(state(module), state(fresh))
    assert not torch.equal(module.net[3].weight, begun)


@pytest.mark.parametrize("shrink", [True, False])
def test_a_resumed_run_is_the_one_that_was_not_stopped(tmp_path, shrink):
    def pruner():
        return plp.StructuredPruning(plp.PROscore(), 0.4, shrink=shrink, samples=SAMPLES)

    straight = Steady("adamw")
    Trainer(max_epochs=3, callbacks=[pruner()], **QUIET).fit(straight, tiny_loader())
    first = Steady("adamw")
    trainer = Trainer(max_epochs=2, callbacks=[pruner()], **QUIET)
    trainer.fit(first, tiny_loader())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    second = Steady("adamw")
    with torch.no_grad():
        for p in second.parameters():
            p.normal_()  # what the file holds decides, not what would be scored now
    resumed = pruner()
    Trainer(max_epochs=3, callbacks=[resumed], **QUIET).fit(second, tiny_loader(), ckpt_path=tmp_path / "two.ckpt")
    assert_same(state(second), state(straight))
    assert resumed.groups.sizes
    third = Steady("adamw")  # a new process tests the file
    Trainer(callbacks=[pruner()], **QUIET).validate(
        third, tiny_loader(), ckpt_path=tmp_path / "two.ckpt", verbose=False
    )
    assert sizes(third) == sizes(first)
    assert_same({n: p for n, p in state(third).items() if "seen" not in n}, state(first))


def test_the_best_checkpoint_is_tested_and_a_second_fit_goes_on(tmp_path):
    module = Steady()
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    pruner = plp.StructuredPruning(MAGNITUDE, 0.5)
    settings = {**QUIET, "enable_checkpointing": True}
    trainer = Trainer(max_epochs=1, callbacks=[pruner, best], **settings)
    trainer.fit(module, tiny_loader(), tiny_loader(16))
    trainer.validate(module, tiny_loader(16), ckpt_path="best", verbose=False)
    after = sizes(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, tiny_loader(), tiny_loader(16))
    assert sizes(module) == after
    with expect_refusal("settings"):
        other = Trainer(max_epochs=3, callbacks=[plp.StructuredPruning(MAGNITUDE, 0.4)], **QUIET)
        other.fit(Steady(), tiny_loader(), ckpt_path=best.best_model_path)
    wider = Steady()
    wider.net[6], wider.net[9] = nn.Linear(72, 40), nn.Linear(40, 4)
    with expect_refusal("net.6.weight is (40, 72) here, (16, 72) there", "same arguments"):
        Trainer(max_epochs=2, callbacks=[plp.StructuredPruning(MAGNITUDE, 0.5)], **QUIET).fit(
            wider, tiny_loader(), ckpt_path=best.best_model_path
        )
    assert wider.net[0].out_channels == 8


def test_a_checkpoint_without_cuts_is_refused_and_the_module_left_whole(tmp_path):
    dense = Steady()
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(dense, tiny_loader())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    module = Steady()
    before = state(module)
    with expect_refusal("StructuredPruning"):
        Trainer(max_epochs=2, callbacks=[plp.StructuredPruning(MAGNITUDE, 0.5)], **QUIET).fit(
            module, tiny_loader(), ckpt_path=tmp_path / "dense.ckpt"
        )
    assert_same(state(module), before)
    assert not module._load_state_dict_pre_hooks


@pytest.mark.parametrize("where", ["setup", "on_fit_start", "validation_step", "configure_optimizers"])
def test_a_failure_before_the_first_step_leaves_the_module_whole(where):
    class Broken(Steady):
        pass

    def fail(*_, **__):
        raise RuntimeError("broken")

    setattr(Broken, where, fail)
    module = Broken()
    before, ids = state(module), [id(p) for p in module.parameters()]
    with pytest.raises(RuntimeError, match="broken"):
        Trainer(max_epochs=1, callbacks=[plp.StructuredPruning(MAGNITUDE, 0.5)], **QUIET).fit(
            module, tiny_loader(), tiny_loader(16)
        )
    assert_same(state(module), before)
    assert [id(p) for p in module.parameters()] == ids
    assert module.net[0].out_channels == 8
    with expect_refusal("without its cuts"):
        plp.save_shrunk(module, "nowhere")
    module(torch.randn(2, 1, 8, 8))


class Attention(LightningModule):
    """Heads, a stream with layer norms, and batches of dicts."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.layer = nn.TransformerEncoderLayer(12, 4, 16, 0.0, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.layer(self.embed(x[:, 0])).mean(1))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("exact", [True, False])
def test_heads_and_hidden_units_of_a_transformer_leave(tmp_path, exact):
    module = Attention()
    dense = sizes(module)
    pruner = plp.StructuredPruning(plp.PROscore(), 0.5, allocation=plp.Layerwise(), exact=exact, samples=SAMPLES)
    trainer = Trainer(max_epochs=1, callbacks=[pruner], **QUIET)
    trainer.fit(module, tiny_loader())
    small = sizes(module)
    assert small.keys() == dense.keys()
    assert small["layer.linear1.weight"][0] == 8
    assert small["layer.self_attn.in_proj_weight"][0] == 18
    assert small["embed.weight"][0] == (12 if exact else 6)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Attention()
    Trainer(max_epochs=1, callbacks=[copy.deepcopy(pruner)], **QUIET).fit(
        again, tiny_loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert_same(state(again), state(module))


def test_what_cannot_be_cut_is_refused():
    class Late(Steady):
        def configure_model(self):
            self.net.append(nn.Identity())

    class Grows(Steady):
        def setup(self, stage):
            self.extra = nn.Linear(2, 2)

    def fitted(module, *callbacks, **settings):
        Trainer(max_epochs=1, callbacks=list(callbacks), **{**QUIET, **settings}).fit(module, tiny_loader())

    cut = plp.StructuredPruning(MAGNITUDE, 0.5)
    with expect_refusal("configure_model"):
        fitted(Late(), cut)
    with expect_refusal("extra"):
        fitted(Grows(), cut)
    with expect_refusal("EMAWeightAveraging"):
        fitted(Steady(), EMAWeightAveraging(), cut)
    with expect_refusal("spawn"):  # in `setup` of each process that is started
        refuse_cut(Trainer(strategy="ddp_spawn", **{**QUIET, "devices": 2}), Steady(), cut)
    with expect_refusal("several"):
        fitted(Steady(), cut, plp.StructuredPruning(MAGNITUDE, 0.5, name="b"))
    with expect_refusal("both"):
        fitted(Steady(), plp.StructuredPruning(MAGNITUDE, 0.5, shrink=False), plp.PruneAtInit())
    with expect_refusal("ByGroup"):
        plp.StructuredPruning(plp.SNIP())
    with expect_refusal("shrink"):
        plp.StructuredPruning(exact=False, shrink=False)

    class Forgets(Steady):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[0].parameters(), 0.1)

    module = Forgets()
    with expect_refusal("optimizer"):
        fitted(module, cut)
    assert sizes(module) == sizes(Steady())


def test_averages_are_taken_of_the_small_network():
    module = Steady()
    average = EMAWeightAveraging(decay=0.5)
    pruner = plp.StructuredPruning(MAGNITUDE, 0.5, allocation=plp.Layerwise())
    Trainer(max_epochs=1, callbacks=[pruner, average], **QUIET).fit(module, tiny_loader())
    assert len(module.net[0].weight) == 4
    module(torch.randn(2, 1, 8, 8))


@pytest.mark.filterwarnings("ignore:LearningRateFinder ends", "ignore:.*suggested", "ignore:.*checkpoint")
def test_finders_and_masks_work_on_the_small_network(tmp_path):
    module = Steady()
    module.lr = 0.1
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), module.lr)
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    pruner, masks = plp.StructuredPruning(MAGNITUDE, 0.5, allocation=plp.Layerwise()), plp.PruneAtInit(sparsity=0.5)
    settings = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer = Trainer(max_epochs=1, callbacks=[pruner, masks, finder], **settings)
    trainer.fit(module, tiny_loader(), tiny_loader(16))
    assert trainer.global_step == 4
    assert len(module.net[0].weight) == 4
    zeros = sum(int((module.get_parameter(n) == 0).sum()) for n in masks.masks)
    assert zeros == sum(int((~m).sum()) for m in masks.masks.values()) > 0


def test_ratios_targets_and_rounding(fit):
    module = Steady()
    dense = sizes(module)
    pruner = plp.StructuredPruning(
        MAGNITUDE,
        0.5,
        target="macs",
        ratios={"net.0": 0.25},
        round_to=2,
    )
    fit(pruner, module=module)
    assert module.net[0].out_channels == 6
    assert module.net[3].out_channels % 2 == module.net[6].out_features % 2 == 0
    assert sizes(module) != dense
    whole = plp.trace_groups(Steady(), torch.randn(2, 1, 8, 8))
    left = plp.trace_groups(module, torch.randn(2, 1, 8, 8))
    assert left.cost({})[1] <= whole.cost({})[1] / 2
