from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from fake_module import TinyModule, tiny_data, tiny_loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, ModelPruning
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import pl_prune as plp


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class ZerosAfterEveryStep(Callback):
    def __init__(self, pruner):
        self.pruner = pruner
        self.checked = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        live = dict(pl_module.named_parameters())
        for name, keep in self.pruner.masks.items():
            assert (live[name][~keep] == 0).all()
            assert not keep.all()
        self.checked += 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_zeros_hold_after_every_step_at_the_exact_sparsity(fit, optimizer, settings):
    pruner = plp.PruneAtInit(sparsity=0.8)
    check = ZerosAfterEveryStep(pruner)
    module, _ = fit(pruner, check, module=TinyModule(optimizer), **settings)
    assert check.checked == 8
    total = 8 * 9 + 8 * 8 * 9 + 72 * 16
    kept = sum(int((module.get_parameter(name) != 0).sum()) for name in pruner.masks)
    assert kept == total - round(0.8 * total)
    assert set(pruner.masks) == {"net.0.weight", "net.3.weight", "net.6.weight"}


def test_a_run_with_dense_is_the_run_without_a_callback(fit):
    bare, _ = fit()
    dense, _ = fit(plp.Dense())
    assert_same(state(bare), state(dense))
    assert bare.seen == dense.seen


def test_pruning_changes_neither_the_order_of_batches_nor_the_random_state(fit):
    class RandomStateAtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            self.state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def shuffled(*callbacks):
        class Shuffled(TinyModule):
            def train_dataloader(self):
                return DataLoader(tiny_data(), 16, shuffle=True)

        module = Shuffled()
        module.seen.clear()
        return fit(*callbacks, module=module, **{"max_epochs": 1})

    dense, pruned = RandomStateAtStart(), RandomStateAtStart()
    a, _ = fit(dense)
    b, _ = fit(plp.PruneAtInit(), pruned)
    assert a.seen == b.seen
    assert torch.equal(dense.state[0], pruned.state[0])
    assert dense.state[1:] == pruned.state[1:]
    a, _ = shuffled()
    b, _ = shuffled(plp.PruneAtInit())
    assert a.seen == b.seen


def test_state_dict_loads_strictly_into_the_plain_module(fit):
    module, _ = fit(plp.PruneAtInit())
    fresh = TinyModule()
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert [n for n, _ in fresh.named_parameters()] == [n for n, _ in module.named_parameters()]


def test_parameter_objects_and_the_sanity_check_see_the_same_pruned_network(fit):
    module = TinyModule()
    before = {name: id(p) for name, p in module.named_parameters()}
    zeros_at_sanity = []

    class Look(Callback):
        def on_sanity_check_start(self, trainer, pl_module):
            zeros_at_sanity.append(int((pl_module.net[6].weight == 0).sum()))

    fit(plp.PruneAtInit(sparsity=0.9), Look(), module=module)
    assert {name: id(p) for name, p in module.named_parameters()} == before
    assert zeros_at_sanity[0] > 0


def test_masks_equal_what_the_python_interface_gives(fit):
    pruner = plp.PruneAtInit(plp.SNIP(), sparsity=0.7, allocation=plp.ERK(), bn_warmup="never")
    torch.manual_seed(0)
    module = TinyModule()
    twin = copy.deepcopy(module)
    fit(pruner, module=module)
    data = tiny_data()
    chosen = plp.Samples().indices(data)
    batches = [(data.tensors[0][i : i + 1], data.tensors[1][i : i + 1]) for i in chosen]
    scores = plp.score(twin, plp.SNIP(), batches, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    assert pruner.masks == plp.ERK()(scores, 0.7)


def test_clipping_sees_masked_gradients(fit):
    norms = []

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            masks = pruner.masks
            norms.append(
                sum(float(p.grad[~masks[n]].abs().sum()) for n, p in pl_module.named_parameters() if n in masks)
            )

    pruner = plp.PruneAtInit()
    fit(pruner, Norms())
    assert len(norms) == 8
    assert all(n == 0 for n in norms)


class Manual(TinyModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.masked_norms = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.masked_norms.append(float(self.net[6].weight.grad[self.net[6].weight == 0].abs().sum()))
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()


class ManualWithScoring(Manual):
    def scoring_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_manual_optimization_needs_a_scoring_step_and_then_clips_masked_gradients(fit):
    with pytest.raises(plp.PruneError, match="scoring_step"):
        fit(plp.PruneAtInit(), module=Manual())
    pruner = plp.PruneAtInit()
    check = ZerosAfterEveryStep(pruner)
    module, _ = fit(pruner, check, module=ManualWithScoring())
    assert check.checked == 8
    assert module.masked_norms == [0.0] * 8


@pytest.mark.parametrize("stop_epoch", [0, 1])
def test_resume_after_a_crash_at_an_epochs_end_is_bit_identical(fit, tmp_path, stop_epoch):
    class NoDropout(TinyModule):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.net[7] = nn.Identity()

    class Crash(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == stop_epoch + 1:
                raise RuntimeError("power cut")

    whole = plp.PruneAtInit()
    straight, _ = fit(whole, module=NoDropout(), max_epochs=3)
    saver = {"enable_checkpointing": True, "max_epochs": 3}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(
            plp.PruneAtInit(), Crash(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), module=NoDropout(), **saver
        )
    resumed = plp.PruneAtInit()
    module, _ = fit(resumed, module=NoDropout(), ckpt_path=tmp_path / f"epoch={stop_epoch}.ckpt", max_epochs=3)
    assert resumed.masks == whole.masks
    assert_same(state(straight), state(module))


def save_run(fit, tmp_path, *callbacks, **checkpoint):
    fit(*callbacks, ModelCheckpoint(tmp_path, "run", **checkpoint), enable_checkpointing=True, max_epochs=1)
    return tmp_path / "run.ckpt"


def test_a_checkpoint_is_plain_and_packed(fit, tmp_path):
    path = save_run(fit, tmp_path, plp.PruneAtInit())
    saved = torch.load(path, weights_only=True)["callbacks"]["PruneAtInit"]
    total = 72 + 576 + 1152
    assert sum(bits.numel() for bits in saved["masks"]["bits"].values()) == total // 8
    assert "SNIP()" in saved["settings"]


def test_resume_without_the_masks_is_refused(fit, tmp_path):
    pruned = save_run(fit, tmp_path / "pruned", plp.PruneAtInit())
    dense = save_run(fit, tmp_path / "dense")
    weights = save_run(fit, tmp_path / "weights", plp.PruneAtInit(), save_weights_only=True)
    for path, callback, lacking in [
        (dense, plp.PruneAtInit(), "no such state"),
        (weights, plp.PruneAtInit(), "no such state"),
        (pruned, plp.PruneAtInit(name="other"), "PruneAtInit"),
        (pruned, plp.Dense(), "PruneAtInit"),
        (pruned, plp.SparsityReport(), "PruneAtInit"),
        (pruned, plp.PruneAtInit(sparsity=0.8), "SNIP.. at sparsity 0.9, Global.*found 'SNIP.. at sparsity 0.8"),
        (pruned, plp.PruneAtInit(plp.GraSP()), "found 'GraSP"),
    ]:
        with pytest.raises(plp.PruneError, match=lacking):
            fit(callback, ckpt_path=path)


def test_resume_into_another_architecture_is_refused(fit, tmp_path):
    path = save_run(fit, tmp_path, plp.PruneAtInit())
    saved = torch.load(path, weights_only=True)
    saved["callbacks"]["PruneAtInit"]["masks"]["shapes"]["net.6.weight"] = [72, 16]
    torch.save(saved, path)
    with pytest.raises(plp.PruneError, match=r"net.6.weight: mask \(72, 16\), parameter \(16, 72\)"):
        fit(plp.PruneAtInit(), ckpt_path=path)


def test_a_second_fit_keeps_the_masks_and_another_module_gets_its_own(fit):
    pruner = plp.PruneAtInit()
    module, _ = fit(pruner)
    first = pruner.masks
    fit(pruner, module=module)
    assert pruner.masks == first
    fit(pruner, seed=11)
    assert pruner.masks != first


def test_no_hook_is_left_behind(fit):
    class Boom(Callback):
        def on_train_batch_end(self, trainer, *_):
            raise RuntimeError("boom")

    module = ManualWithScoring()
    pruner = plp.PruneAtInit()
    with pytest.raises(RuntimeError, match="boom"):
        fit(pruner, Boom(), module=module)
    weight = module.net[6].weight
    module.net(torch.randn(2, 1, 8, 8)).sum().backward()
    assert weight.grad[~pruner.masks["net.6.weight"]].abs().sum() > 0


def test_a_failed_scoring_leaves_no_trace(fit):
    class Nan(TinyModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    module = Nan()
    before = state(module)
    rng = []

    class Rng(Callback):
        def on_fit_start(self, trainer, pl_module):
            rng.append(torch.get_rng_state())

        def on_exception(self, trainer, pl_module, exception):
            rng.append(torch.get_rng_state())

    with pytest.raises(plp.PruneError, match="finite loss; found nan"):
        fit(Rng(), plp.PruneAtInit(), module=module)
    assert_same(before, state(module))
    assert module.seen == []
    assert "log" not in module.__dict__


def test_two_callbacks_on_one_parameter_are_refused_and_parted_ones_are_not(fit):
    module = TinyModule()
    before = state(module)
    with pytest.raises(plp.PruneError, match=r"'PruneAtInit\[a\]' and 'PruneAtInit\[b\]' both on 'net.0.weight'"):
        fit(plp.PruneAtInit(name="a"), plp.PruneAtInit(name="b"), module=module)
    assert_same(before, state(module))
    one = plp.PruneAtInit(name="a", sparsity=0.5, select=plp.Select(include=["net.0"]))
    two = plp.PruneAtInit(name="b", sparsity=0.8, select=plp.Select(exclude=["net.0"]))
    fit(one, two)
    assert one.masks.sparsity() == 0.5
    assert set(two.masks) == {"net.3.weight", "net.6.weight"}


@pytest.mark.filterwarnings("ignore:.*LearningRateFinder ends before", "ignore:.*lr_find", "ignore:Failed to compute")
@pytest.mark.parametrize("first", [True, False], ids=["pruner first", "finder first"])
def test_the_learning_rate_finder_tunes_the_dense_network_and_says_so(fit, tmp_path, first):
    class Tunable(TinyModule):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    pruner, finder = plp.PruneAtInit(sparsity=0.8), LearningRateFinder(num_training_steps=8)
    with pytest.warns(UserWarning, match="finds the learning rate of the dense network"):
        module, _ = fit(*([pruner, finder] if first else [finder, pruner]), module=Tunable())
    for name, mask in pruner.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask)


@pytest.mark.filterwarnings("ignore:.*lr_find", "ignore:.*does not have many workers")
def test_the_batch_size_finder_runs_first(tmp_path):
    class Sized(TinyModule):
        batch_size = 4

        def train_dataloader(self):
            return DataLoader(tiny_data(), self.batch_size)

        def val_dataloader(self):
            return DataLoader(tiny_data(16), 16)

    pruner, finder = plp.PruneAtInit(sparsity=0.8), BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=4)
    module = Sized()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[pruner, finder],
    )  # fmt: skip
    trainer.fit(module)
    assert module.batch_size > 4
    for name, mask in pruner.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask)


def test_another_tool_that_prunes_is_refused(fit):
    with pytest.raises(plp.PruneError, match="ModelPruning"):
        fit(plp.PruneAtInit(), ModelPruning("l1_unstructured"))


def test_layer_collapse_warns_raises_and_repairs(fit):
    class Skewed(TinyModule):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.net[3].weight.mul_(1e-6)

    settings = {"criterion": plp.Magnitude(), "sparsity": 0.9}
    with pytest.warns(UserWarning, match=r"1 empty layers \(net.3.weight\) and no path"):
        fit(plp.PruneAtInit(**settings), module=Skewed())
    with pytest.raises(plp.PruneError, match="on_layer_collapse='repair'"):
        fit(plp.PruneAtInit(**settings, on_layer_collapse="raise"), module=Skewed())
    pruner = plp.PruneAtInit(**settings, on_layer_collapse="repair")
    fit(pruner, module=Skewed())
    counts = pruner.masks.counts()
    assert counts["net.3.weight"][0] == 1
    assert sum(kept for kept, _ in counts.values()) == 1800 - 1620


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*tiny_data().tensors, strict=True))


def test_data_without_labels_or_length_is_named(fit):
    class Unlabelled(TinyModule):
        def training_step(self, batch, batch_idx):
            x = batch[0] if isinstance(batch, list) else batch
            return self(x).square().mean()

    def loaders(data):
        class Own(Unlabelled):
            def scoring_dataloader(self):
                return DataLoader(data, 16)

        return Own()

    images = [x for x, _ in tiny_data()]
    with pytest.raises(plp.PruneError, match=r"samples\.total"):
        fit(plp.PruneAtInit(), module=loaders(images))
    with pytest.raises(plp.PruneError, match="IterableDataset"):
        fit(plp.PruneAtInit(), module=loaders(Stream()))
    for data in (images, Stream()):
        pruner = plp.PruneAtInit(samples=plp.Samples(total=24))
        fit(pruner, module=loaders(data))
        assert pruner.masks.sparsity() == 0.9


def test_the_samples_cut_does_not_matter(fit):
    masks = []
    for batch_size in (1, 7, 100):
        pruner = plp.PruneAtInit(samples=plp.Samples(batch_size=batch_size))
        fit(pruner, max_epochs=1)
        masks.append(pruner.masks)
    assert masks[0] == masks[1] == masks[2]


def test_callbacks_pickle_and_copy(fit):
    pruner = plp.PruneAtInit()
    fit(pruner)
    for twin in (pickle.loads(pickle.dumps(pruner)), copy.deepcopy(pruner)):
        assert twin.masks == pruner.masks


def test_the_message_says_what_was_scored_on(fit, monkeypatch):
    said = []
    monkeypatch.setattr("pl_prune.callbacks.prune_at_init.rank_zero_info", said.append)
    fit(plp.PruneAtInit())
    assert said == [
        "PruneAtInit: SNIP() at sparsity 0.9, Global(), batch norms warmed up on 4 batches of the train set, "
        "scored on 40 samples of the train set: 180 of 1,800 kept."
    ]


def test_validate_and_test_with_a_checkpoint_keep_the_zeros(fit, tmp_path):
    path = save_run(fit, tmp_path, plp.PruneAtInit())
    module = TinyModule()
    _, trainer = fit(max_epochs=0)
    trainer.validate(module, tiny_loader(16), ckpt_path=path, verbose=False)
    assert (module.net[6].weight == 0).float().mean() > 0.5


def test_layers_whose_scores_are_all_zero_are_named(fit):
    class ZeroHead(TinyModule):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.net[9].weight)

    with pytest.warns(UserWarning, match=r"every score is zero in 3 of 3 layers \(net.0.weight, net.3.weight"):
        fit(plp.PruneAtInit(on_layer_collapse="repair"), module=ZeroHead(), max_epochs=1)


@pytest.mark.parametrize("shown", [True, False])
def test_a_progress_bar_waits_for_a_second(fit, monkeypatch, shown):
    bars = []

    def bar(items, **settings):
        bars.append(settings)
        return items

    monkeypatch.setattr("pl_prune.callbacks.bridge.tqdm", bar)
    fit(plp.PruneAtInit(), enable_progress_bar=shown, max_epochs=1)
    assert {"pl_prune: gradients", "pl_prune: scoring samples"} <= {b["desc"] for b in bars}
    assert all(b["delay"] == 1.0 and b["disable"] is not shown for b in bars)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: plp.PruneAtInit(plp.SNIP), r"criterion to be a Criterion; found the class SNIP.*pl_prune.SNIP\(\)"),
        (lambda: plp.PruneAtInit("SNIP"), "found str 'SNIP'"),
        (lambda: plp.PruneAtInit(0.9), "found float '0.9'"),
        (lambda: plp.PruneAtInit(allocation=plp.ERK), "found the class ERK"),
        (lambda: plp.PruneAtInit(select="net.0"), "select to be a Select"),
        (lambda: plp.PruneAtInit(samples=64), "samples to be a Samples"),
        (lambda: plp.PruneAtInit(sparsity=90), "Write 90 % as 0.9"),
        (lambda: plp.PruneAtInit(init="xavierr"), "'normal', 'xavier', 'kaiming'; found 'xavierr'"),
        (lambda: plp.PruneAtInit(bn_warmup="allways"), "found 'allways'"),
        (lambda: plp.PruneAtInit(on_layer_collapse="raises"), "found 'raises'"),
        (lambda: plp.GaussNewtonDiagonal("foo"), "GaussNewtonDiagonal.estimator to be one of 'gnb', 'sketch', 'exact'"),
        (lambda: plp.GraSP(bn_mode="foo"), "GraSP.bn_mode"),
        (lambda: plp.HutchinsonTaylor(probe_per="foo"), "HutchinsonTaylor.probe_per"),
        (lambda: plp.FisherTaylor(taylor_sign="foo"), "FisherTaylor.taylor_sign"),
        (lambda: plp.score(nn.Linear(1, 1), plp.SNIP), "found the class SNIP"),
        (lambda: plp.attach_masks(nn.Linear(1, 1), None, None), "optimizer to be a Optimizer"),
        (lambda: plp.MaskSet({"w": torch.ones(1).bool()}).apply_(nn.Linear(1, 1)), "named_parameters"),
    ],
)
def test_wrong_arguments_are_named_at_once(make, said):
    with pytest.raises(plp.PruneError, match=said):
        make()
