"""Corners of the callback contract, each of which was wrong once."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_module import TinyModule, tiny_data, tiny_loader
from lightning.pytorch.callbacks import ModelCheckpoint
from refusal import expect_refusal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pl_prune as plp


def test_masks_of_another_run_are_not_taken_over(fit, tmp_path):
    fit(plp.PruneAtInit(sparsity=0.9), ModelCheckpoint(tmp_path, "run"), enable_checkpointing=True, max_epochs=1)
    pruner = plp.PruneAtInit(sparsity=0.5)
    _, trainer = fit(pruner, max_epochs=0)
    first = pruner.masks
    trainer.validate(TinyModule(), tiny_loader(16), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert pruner.masks == first
    fit(pruner, max_epochs=0, seed=5)
    assert pruner.masks.sparsity() == 0.5
    twin = copy.deepcopy(pruner)
    fit(twin, max_epochs=0, seed=6)
    assert twin.masks != pruner.masks


def test_a_step_that_differentiates_is_scored_and_reported(fit, tmp_path):
    class Adversarial(TinyModule):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            loss = nn.functional.cross_entropy(self(x), batch[1])
            (grad,) = torch.autograd.grad(loss, x)
            return nn.functional.cross_entropy(self((x + 0.1 * grad.sign()).detach()), batch[1])

    pruner = plp.PruneAtInit(plp.FisherPruning())
    fit(pruner, plp.SparsityReport(str(tmp_path)), module=Adversarial(), max_epochs=1)
    assert pruner.masks.sparsity() == 0.9


def test_a_last_batch_of_one_sample_does_not_stop_the_warm_up(fit):
    class Flat(TinyModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

        def scoring_dataloader(self):
            data = tiny_data()
            return DataLoader(TensorDataset(*(torch.cat([t, t[:1]]) for t in data.tensors)), batch_size=16)

    module, _ = fit(plp.PruneAtInit(), module=Flat(), max_epochs=0)
    assert int(module.net[2].num_batches_tracked) == 5


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize(
    "criterion", [plp.FisherTaylor(), plp.GaussNewtonPruning(), plp.HutchinsonDiagonal(temperature=1.0)]
)
def test_half_precision_gives_scores_in_float32(criterion, precision):
    torch.manual_seed(0)
    model = TinyModule().net.eval()
    half = copy.deepcopy(model).to(torch.bfloat16 if precision == "bf16-true" else torch.float16)
    x, y = tiny_data().tensors
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    found = plp.score(half, criterion, [(x.to(next(half.parameters()).dtype), y)], loss)
    assert {s.dtype for s in found.values()} == {torch.float32}
    assert all(s.isfinite().all() for s in found.values())


def test_a_refused_collapse_undoes_the_preparation(fit):
    torch.manual_seed(0)
    module = TinyModule()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(plp.PruneError, match=r"found 3 empty layers|no path"):
        fit(plp.PruneAtInit(sparsity=0.9999, init="kaiming", on_layer_collapse="raise"), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_disjoint_callbacks_are_told_apart_by_the_order_of_execution(fit):
    class Backwards(TinyModule):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(8, 4), nn.Linear(64, 8)
            self.mid = nn.Linear(8, 8)
            del self.net

        def forward(self, x):
            return self.head(self.mid(self.body(x.flatten(1)).relu()).relu())

    one = plp.PruneAtInit(name="a", select=plp.Select(include=["body"]))
    two = plp.PruneAtInit(name="b", select=plp.Select(include=["mid"]))
    fit(one, two, module=Backwards(), max_epochs=1)
    assert (set(one.masks), set(two.masks)) == ({"body.weight"}, {"mid.weight"})


def test_reading_a_shuffled_loader_leaves_the_random_state():
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 4))
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0].flatten(1)), b[1])  # noqa: E731
    before = torch.get_rng_state()
    plp.score(model, plp.SNIP(), DataLoader(tiny_data(), 16, shuffle=True), loss)
    assert torch.equal(before, torch.get_rng_state())


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x.transpose(0, 1))).mean(0))


@pytest.mark.parametrize("length", [5, 6])
def test_fisher_of_a_sequence_first_network(length):
    torch.manual_seed(0)
    model = SequenceFirst().double()
    x, y = torch.randn(6, length, 3, dtype=torch.float64), torch.arange(6) % 2
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    alone = [
        torch.autograd.grad(loss(model, (x[i : i + 1], y[i : i + 1])), model.embed.weight)[0] ** 2 for i in range(6)
    ]
    found = plp.score(model, plp.FisherDiagonal(), [(x, y)], loss)
    torch.testing.assert_close(found["embed.weight"], sum(alone) / 6)


def test_coupled_losses_are_found_beyond_the_first_two_samples():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    weighted = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], weight=torch.tensor([1.0, 1.0, 20.0]))  # noqa: E731
    with pytest.raises(plp.PruneError, match="mean of its samples' losses"):
        plp.score(model, plp.FisherDiagonal(), [(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))], weighted)


def test_a_step_that_fails_while_scoring_is_named(fit):
    class TrainsOnly(TinyModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.training else sum([batch[1]].values())

    with expect_refusal("TrainsOnly.training_step", "'list' object has no attribute 'values'", "scoring_step"):
        fit(plp.PruneAtInit(), module=TrainsOnly())
