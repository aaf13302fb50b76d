"""Pruning beside what Lightning, torch and their users put together."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fake_module import TinyModule, tiny_data, tiny_loader
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from refusal import expect_refusal
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import pl_prune as plp

PRUNERS = {
    "at init": lambda **more: plp.PruneAtInit(plp.SNIP(), sparsity=0.8, **more),
    "gradual": lambda **more: plp.GradualPruning(plp.SNIP(), plp.Linear(final=0.8, start=1, end=3, every=1), **more),
}
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
every_pruner = pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)


def assert_pruned(module, pruner, sparsity=0.8):
    assert plp.MaskSet.from_zeros({name: module.get_parameter(name) for name in pruner.masks}) == pruner.masks
    total = sum(mask.numel() for mask in pruner.masks.values())
    assert round(pruner.masks.sparsity() * total) == int(sparsity * total + 0.5)


class Compiled(TinyModule):
    """A module whose body is compiled: its parameters' names hold `_orig_mod`."""

    def __init__(self, compiled=True, backend="aot_eager"):
        torch.manual_seed(0)
        super().__init__()
        self.net[7] = nn.Identity()
        body = nn.Sequential(*self.net[:6])
        self.net = nn.Sequential(torch.compile(body, backend=backend) if compiled else body, *self.net[6:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@every_pruner
def test_compiled_modules_are_scored_pruned_and_resumed(fit, tmp_path, pruner):
    saved = ModelCheckpoint(tmp_path, save_last=True)
    plain, compiled = pruner(), pruner()
    a, _ = fit(plain, module=Compiled(False))
    b, _ = fit(compiled, saved, module=Compiled(), enable_checkpointing=True)
    assert set(plain.masks) == {"net.0.0.weight", "net.0.3.weight", "net.1.weight"}
    assert set(compiled.masks) == {"net.0._orig_mod.0.weight", "net.0._orig_mod.3.weight", "net.1.weight"}
    assert plain.masks == plp.MaskSet({name.replace("_orig_mod.", ""): mask for name, mask in compiled.masks.items()})
    assert_pruned(b, compiled)
    for (_, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(one, other)
    checkpoint = torch.load(tmp_path / "last.ckpt")
    state = checkpoint["callbacks"][compiled.state_key]
    assert set(state["masks"]["shapes"]) == set(plain.masks)
    resumed = pruner()
    c, _ = fit(resumed, module=Compiled(), ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert_pruned(c, resumed)
    checkpoint["state_dict"] = {key.replace("_orig_mod.", ""): value for key, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    resumed = pruner()
    d, _ = fit(resumed, module=Compiled(False), ckpt_path=tmp_path / "plain.ckpt", max_epochs=3)
    assert resumed.masks == plain.masks
    assert_pruned(d, resumed)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:The .grad attribute of a Tensor"
)
def test_a_compiled_lightning_module_is_scored_twice_differentiated(fit):
    pruner = plp.PruneAtInit(plp.HutchinsonPruning(probes=2), sparsity=0.8)
    module = torch.compile(Compiled(False), backend="aot_eager")
    fit(pruner, module=module)
    assert_pruned(module._orig_mod if hasattr(module, "_orig_mod") else module, pruner)


def test_patterns_need_no_orig_mod():
    module = Compiled()
    for pattern in ("net.0.3", "net.0.3.weight", "net.0._orig_mod.3"):
        assert list(plp.Select(include=[pattern])(module)) == ["net.0._orig_mod.3.weight"]


class Backboned(TinyModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(*self.net[:6]), nn.Sequential(*self.net[6:])
        del self.net

    def forward(self, x):
        return self.head(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist within another group")
@every_pruner
def test_a_backbone_that_thaws_later(fit, pruner):
    head_only, whole = pruner(), pruner(select=plp.Select(frozen=True))
    fit(head_only, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False), module=Backboned(), max_epochs=3)
    assert set(head_only.masks) == {"head.0.weight"}

    class Thawed(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.thawed = pl_module.backbone[0].weight.requires_grad

    look = Thawed()
    module, _ = fit(
        whole, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False), look, module=Backboned(), max_epochs=3
    )
    assert set(whole.masks) == {"backbone.0.weight", "backbone.3.weight", "head.0.weight"}
    assert look.thawed
    assert_pruned(module, whole)


def test_frozen_parameters_are_passed_over_and_scored_only_when_asked(fit):
    module = TinyModule()
    module.net[3].weight.requires_grad = False
    pruner = plp.PruneAtInit(plp.SNIP(), sparsity=0.8)
    fit(pruner, module=module)
    assert set(pruner.masks) == {"net.0.weight", "net.6.weight"}
    asked = plp.PruneAtInit(plp.SNIP(), sparsity=0.8, select=plp.Select(frozen=True))
    fit(asked, module=module)
    assert not module.net[3].weight.requires_grad
    assert 0 < asked.masks.sparsity("net.3.weight") < 1
    assert_pruned(module, asked)
    module.requires_grad_(False)
    with expect_refusal("net.0.weight is frozen", "set frozen=True"):
        fit(plp.PruneAtInit(), module=module)


class Adapted(nn.Module):
    """A LoRA layer, named and built as PEFT's are."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_lora_adapters_stay_dense_unless_named(fit):
    class WithAdapter(TinyModule):
        def __init__(self):
            super().__init__()
            self.net[6] = Adapted(self.net[6])

    pruner = plp.PruneAtInit(sparsity=0.8)
    module, _ = fit(pruner, module=WithAdapter())
    assert set(pruner.masks) == {"net.0.weight", "net.3.weight"}
    base = plp.PruneAtInit(sparsity=0.8, select=plp.Select(frozen=True))
    module, _ = fit(base, module=WithAdapter())
    assert set(base.masks) == {"net.0.weight", "net.3.weight", "net.6.base_layer.weight"}
    assert_pruned(module, base)
    named = plp.PruneAtInit(plp.Magnitude(), sparsity=0.5, select=plp.Select(include=["*lora_A*"]))
    fit(named, module=WithAdapter())
    assert set(named.masks) == {"net.6.lora_A.default.weight"}


class LanguageModel(LightningModule):
    """Tied input and output embeddings."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(
            self.head(self.body(self.embed(batch[:, :-1])).relu()).transpose(1, 2), batch[:, 1:]
        )

    def train_dataloader(self):
        return DataLoader(torch.randint(16, (32, 6), generator=torch.Generator().manual_seed(0)), 8)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def lone_trainer(*callbacks, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 2, **quiet, **settings}, callbacks=list(callbacks)
    )


def test_tied_embeddings_stay_dense_and_tied(fit):
    pruner = plp.PruneAtInit(
        plp.SNIP(), sparsity=0.8, samples=plp.Samples(total=8), select=plp.Select(output_layer=True)
    )
    module = LanguageModel()
    lone_trainer(pruner).fit(module)
    assert set(pruner.masks) == {"body.weight"}
    assert module.head.weight is module.embed.weight
    assert bool((module.embed.weight != 0).all())
    assert_pruned(module, pruner)


@every_pruner
def test_layers_built_in_configure_model(fit, pruner):
    class Late(TinyModule):
        def __init__(self):
            super().__init__()
            del self.net
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = TinyModule().net

    pruner = pruner()
    module, _ = fit(pruner, module=Late())
    assert_pruned(module, pruner)


def test_layers_that_are_still_lazy_are_named(fit):
    class Lazy(TinyModule):
        def __init__(self):
            super().__init__()
            self.net[6] = nn.LazyLinear(16)

        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if "6" not in n], 0.1)

    with expect_refusal("lazy 'net.6.weight'", "Run one batch"):
        fit(plp.PruneAtInit(), module=Lazy())


@every_pruner
@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": 2}, {"overfit_batches": 2, "max_epochs": 3}, {"max_time": "00:00:10:00"}], ids=str
)
def test_trainer_flags(fit, pruner, settings):
    pruner = pruner()
    module, _ = fit(pruner, module=TinyModule(), **settings)
    if "fast_dev_run" in settings and isinstance(pruner, plp.GradualPruning):
        assert pruner.masks.sparsity() == 0.0  # two steps of a schedule that starts to prune after the second
    else:
        assert_pruned(module, pruner)


def test_a_fit_that_runs_out_of_time_says_how_sparse_it_is(fit):
    class Late(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"ended after 1 optimizer steps.*the sparsity is 0.0000, not 0.8"):
        fit(PRUNERS["gradual"](), Late())


@pytest.mark.filterwarnings("ignore:.*use of fork")
@every_pruner
def test_persistent_workers_see_the_same_batches_as_without_pruning(fit, pruner):
    class Workers(TinyModule):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.given = []

        def on_train_batch_start(self, batch, batch_idx):
            self.given.append(batch[1].tolist())

    def trained(callback):
        torch.manual_seed(5)
        module = Workers()
        loader = DataLoader(tiny_data(), 16, shuffle=True, num_workers=1, persistent_workers=True)
        lone_trainer(callback).fit(module, loader)
        return module

    pruner = pruner()
    pruned = trained(pruner)
    assert pruned.given == trained(plp.Dense()).given
    assert len(pruned.given) == 8
    assert_pruned(pruned, pruner)


class Stream(IterableDataset):
    """Counts how often it is started."""

    started = 0

    def __iter__(self):
        Stream.started += 1
        return iter(zip(*tiny_data().tensors, strict=True))


@every_pruner
def test_iterable_data_sets(fit, pruner):
    pruner, module = pruner(samples=plp.Samples(total=16)), TinyModule()
    lone_trainer(pruner, max_epochs=-1, max_steps=8).fit(module, DataLoader(Stream(), 16))
    assert len(module.seen) == 8
    assert module.seen[:4] == module.seen[4:]
    assert_pruned(module, pruner)


@every_pruner
def test_copies_and_pickles_of_callback_and_module(fit, pruner):
    pruner = pruner()
    copies = []

    class InTheMiddle(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                trainer_, pl_module.trainer = pl_module.trainer, None
                copies.extend([copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))])
                pl_module.trainer = trainer_
                copies.extend([copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))])

    module, _ = fit(pruner, InTheMiddle(), max_epochs=2)
    for twin in copies[:2]:
        before = {name: p.clone() for name, p in twin.named_parameters()}
        assert plp.MaskSet.from_zeros({name: before[name] for name in pruner.masks}).sparsity() >= 0.5
        twin.net(torch.randn(2, 1, 8, 8)).sum().backward()
        assert bool(twin.net[6].weight.grad[~pruner.masks["net.6.weight"]].any())  # no hook of ours in a copy
    for twin in copies[2:4]:
        fit(twin, module=TinyModule(), seed=9)
        assert twin.masks.sparsity() == 0.8
        assert twin.masks != pruner.masks
    assert_pruned(module, pruner)


@every_pruner
def test_several_fits_go_on_where_the_last_one_ended(fit, pruner):
    pruner = pruner()
    module, _ = fit(pruner, max_epochs=2)
    first = pruner.masks
    fit(pruner, module=module, max_epochs=1)
    assert pruner.masks == first
    assert_pruned(module, pruner)
    other, _ = fit(pruner, seed=11)
    assert pruner.masks != first
    assert_pruned(other, pruner)


@every_pruner
def test_a_trainer_that_fits_twice(fit, pruner):
    pruner, module = pruner(), TinyModule()
    trainer = lone_trainer(pruner, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, tiny_loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, tiny_loader())
    assert len(module.seen) == 12
    assert_pruned(module, pruner)
