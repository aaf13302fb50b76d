from __future__ import annotations

import pytest
import torch
from fake_module import TinyModule
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from refusal import expect_refusal
from torch.optim.swa_utils import SWALR

import pl_prune as plp

AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.8),
    "late EMA": lambda: EMAWeightAveraging(decay=0.8, update_starting_at_step=6),
    "EMA by epochs": lambda: EMAWeightAveraging(decay=0.8, update_every_n_steps=0, update_starting_at_epoch=1),
    "EMA of weights alone": lambda: EMAWeightAveraging(decay=0.8, use_buffers=False),
    "mean": lambda: WeightAveraging(),
    "SWA": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
}


class Watch(Callback):
    """Sees the weights that are validated, and the averages."""

    def __init__(self, pruner: plp.PruneAtInit) -> None:
        self.pruner, self.validated, self.steps = pruner, 0, []

    def zeros_hold(self, named) -> bool:
        named = dict(named)
        return all(bool((named[name].detach()[~mask] == 0).all()) for name, mask in self.pruner.masks.items())

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            assert self.zeros_hold(pl_module.named_parameters())
            self.validated += 1

    def on_train_batch_end(self, trainer, pl_module, *_):
        assert self.zeros_hold(pl_module.named_parameters())
        self.steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


PRUNERS = {
    "at init": lambda: plp.PruneAtInit(sparsity=0.8),
    "gradual": lambda: plp.GradualPruning(schedule=plp.Cubic(final=0.8, start=1, end=10, every=3)),
    "late": lambda: plp.GradualPruning(schedule=plp.OneShot(0.8, start=9)),
    "rewound": lambda: plp.GradualPruning(schedule=plp.Linear(final=0.8, start=2, end=10, every=4), rewind_to=1),
}


@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:.*[Ss]wapping scheduler")
@pytest.mark.parametrize("first", [True, False], ids=["pruner first", "average first"])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
def test_averages_are_as_sparse_as_the_weights(fit, tmp_path, pruner, average, first):
    pruner, saved, averaging = pruner(), ModelCheckpoint(tmp_path, save_last=True), average()
    watch = Watch(pruner)
    order = [pruner, averaging] if first else [averaging, pruner]
    module, _ = fit(*order, watch, saved, max_epochs=3, enable_checkpointing=True)
    assert watch.validated
    assert pruner.masks.sparsity() == 0.8
    assert watch.zeros_hold(module.named_parameters())
    swa = isinstance(averaging, StochasticWeightAveraging)
    with torch.serialization.safe_globals([getattr, SWALR] * swa):  # older torch keeps a function of its scheduler
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    states = [checkpoint["state_dict"]]
    if isinstance(averaging, WeightAveraging):
        states.append(checkpoint["current_model_state"])
        just_restarted = getattr(pruner, "rewind_to", None) is not None and averaging.should_update(epoch_idx=2)
        assert just_restarted or any(not torch.equal(states[0][name], states[1][name]) for name in pruner.masks)
    for state in states:
        assert watch.zeros_hold(state)
        TinyModule().load_state_dict(state)
    assert any(bool((p != 0).any()) for name, p in module.named_parameters() if name in pruner.masks)


def test_the_average_is_that_of_the_sparse_weights(fit):
    watch = Watch(pruner := plp.PruneAtInit(sparsity=0.8))
    module, _ = fit(pruner, watch, EMAWeightAveraging(decay=0.8))
    expected = watch.steps[0]
    for step in watch.steps[1:]:
        expected = {name: 0.8 * old + 0.2 * step[name] for name, old in expected.items()}
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_average_goes_on_from_where_it_was(fit, tmp_path):
    saved = ModelCheckpoint(tmp_path / "one", save_last=True)
    fit(plp.PruneAtInit(sparsity=0.8), EMAWeightAveraging(decay=0.8), saved, max_epochs=1, enable_checkpointing=True)
    state = torch.load(tmp_path / "one" / "last.ckpt", weights_only=True)["state_dict"]

    watch = Watch(pruner := plp.PruneAtInit(sparsity=0.8))
    module, _ = fit(pruner, watch, EMAWeightAveraging(decay=0.8), ckpt_path=tmp_path / "one" / "last.ckpt")
    expected = {name: p for name, p in state.items() if name in watch.steps[0]}
    for step in watch.steps:
        expected = {name: 0.8 * old + 0.2 * step[name] for name, old in expected.items()}
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)
    assert watch.zeros_hold(module.named_parameters())


def test_an_average_that_moves_zeros_is_refused(fit):
    odd = WeightAveraging(avg_fn=lambda averaged, current, n: averaged + 0.1)
    with expect_refusal("WeightAveraging", "zeros to zero", "EMAWeightAveraging"):
        fit(plp.PruneAtInit(), odd)
    with expect_refusal("StochasticWeightAveraging"):
        fit(plp.PruneAtInit(), StochasticWeightAveraging(1e-2, avg_fn=lambda a, b, n: a + 1))
