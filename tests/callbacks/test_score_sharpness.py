"""Sharpness measured while scores are learned: what is logged, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from fake_module import TinyModule, tiny_loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import pl_prune as plp
from pl_prune.adversarial.sharpness import largest_eigenvalue, loss_difference
from pl_prune.core.samples import Samples

sys.path.insert(0, str(Path(__file__).parent))
from launch import launch

SAMPLES = Samples(total=24, batch_size=16)
NAMES = {
    "sharpness/largest_eigenvalue",
    "sharpness/loss_difference_0.01",
    "sharpness/loss_difference_0.1",
    "stability/hamming",
    "stability/hamming_of_kept",
}


def diagnostics(**settings) -> plp.ScoreSharpness:
    return plp.ScoreSharpness(**{"iterations": 3, "rhos": (0.01, 0.1), "samples": SAMPLES, **settings})


def s2ap() -> plp.S2AP:
    return plp.S2AP(0.7, gamma=0.05, warmup_epochs=1)


class Images(TinyModule):
    """Fed with images in [0, 1], which can be attacked; without dropout, whose random state a resume does not restore."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.net[7] = nn.Identity()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].sigmoid(), batch[1]


class Counted(plp.TRADES):
    calls = 0

    def examples(self, *args):
        type(self).calls += 1
        return super().examples(*args)


class Watch(Callback):
    """Note what is logged, the masks, and the state of the process, at the ends of epochs."""

    def __init__(self, learner: plp.ScoreLearning) -> None:
        self.learner, self.metrics, self.masks, self.random = learner, [], [], []

    def on_train_start(self, trainer, pl_module):
        self.first = self.learner.masks

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({name: float(v) for name, v in trainer.callback_metrics.items() if name in NAMES})
        self.masks.append(self.learner.masks)
        self.random.append(torch.get_rng_state())


@pytest.mark.parametrize("robust", [False, True], ids=["clean", "robust"])
@pytest.mark.parametrize("make", [s2ap, lambda: plp.ScoreLearning(0.7, plp.HARP(weight=1.0))], ids=["s2ap", "harp"])
def test_a_fit_is_bit_for_bit_what_it_is_without(fit, make, robust):
    def run(*more):
        learner = make()
        watch = Watch(learner)
        attack = [plp.AdversarialTraining(plp.TRADES(eps=0.1, step_size=0.05, steps=2))] if robust else []
        module, trainer = fit(*more, learner, *attack, watch, module=Images(), accumulate_grad_batches=3)
        return module, trainer, watch, learner

    module, trainer, watch, learner = run()
    measured, other, seen, twin = run(diagnostics())
    assert not watch.metrics[-1]
    assert seen.metrics[-1].keys() == NAMES
    for name, value in module.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value), name
    for name, s in learner._kept["scores"].items():
        assert torch.equal(twin._kept["scores"][name], s), name
    states = zip(trainer.optimizers[0].state.values(), other.optimizers[0].state.values(), strict=True)
    assert all(torch.equal(one["momentum_buffer"], two["momentum_buffer"]) for one, two in states)
    assert all(torch.equal(one, two) for one, two in zip(watch.random, seen.random, strict=True))
    assert measured.seen == module.seen
    assert vars(measured).keys() == vars(module).keys()


def test_what_is_logged_is_measured_on_the_network_as_it_is(fit):
    class Compare(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            held = copy.deepcopy(pl_module.state_dict())
            data = torch.utils.data.DataLoader(tiny_loader().dataset, batch_size=1)
            x, y = (torch.cat(parts) for parts in zip(*SAMPLES.batches(data), strict=True))
            assert len(x) == 24
            pl_module.eval()
            loss = lambda: nn.functional.cross_entropy(pl_module(x), y)  # noqa: E731
            expected = {"sharpness/largest_eigenvalue": largest_eigenvalue(learner.scored, loss, 3)}
            for rho in (0.01, 0.1):
                expected[f"sharpness/loss_difference_{rho}"] = loss_difference(learner.scored, loss, rho)
            pl_module.train()
            for name, value in expected.items():
                assert float(trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-3, abs=1e-6), name
            assert all(torch.equal(value, pl_module.state_dict()[name]) for name, value in held.items())

    learner = s2ap()
    watch = Watch(learner)
    fit(diagnostics(), learner, Compare(), watch)
    for metrics, masks in zip(watch.metrics, watch.masks, strict=True):
        apart = sum(int((masks[name] ^ first).sum()) for name, first in watch.first.items())
        kept, total = (sum(column) for column in zip(*watch.first.counts().values(), strict=True))
        assert metrics["stability/hamming"] == pytest.approx(apart / total)
        assert metrics["stability/hamming_of_kept"] == pytest.approx(apart / (2 * kept))
        assert apart
        assert metrics["sharpness/loss_difference_0.1"] > 0


def test_batches_are_attacked_once_a_time(fit):
    learner = s2ap()
    attack = plp.AdversarialTraining(Counted(eps=0.1, step_size=0.05, steps=2))
    Counted.calls = 0
    fit(diagnostics(), learner, attack, module=Images())
    assert Counted.calls == 2 * 4 + 2 * 2  # of two epochs: four batches trained on, two measured on
    assert "examples" not in vars(attack)


def test_a_measurement_that_fails_leaves_the_pruned_network(fit):
    class Failing(Images):
        def forward(self, x):
            if not self.training:
                calls.append(learner.scored.moved)
                if len(calls) == 30:
                    raise RuntimeError("out of luck")
            return super().forward(x)

    module, learner, calls = Failing(), s2ap(), []
    attack = plp.AdversarialTraining(plp.TRADES(eps=0.1, step_size=0.05, steps=2))
    with pytest.raises(plp.PruneError, match="out of luck"):
        fit(diagnostics(), learner, attack, module=module, limit_val_batches=0)
    assert calls[-1], "it failed on moved scores"
    assert "examples" not in vars(attack)
    for name, mask in learner.masks.items():
        assert torch.equal(dict(module.named_parameters())[name] != 0, mask)


def test_a_resumed_fit_counts_from_the_first_masks(fit, tmp_path):
    def run(*more, **settings):
        learner = s2ap()
        watch = Watch(learner)
        fit(learner, *more, watch, module=Images(), max_epochs=3, **settings)
        return watch

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight = run(diagnostics(), saver, enable_checkpointing=True)
    path = tmp_path / "epoch=0.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["ScoreSharpness"]["first"]
    assert sum(bits.numel() for bits in state["bits"].values()) < 240, "bits, not bytes"
    resumed = run(diagnostics(), ckpt_path=path)
    assert resumed.metrics == straight.metrics[1:]
    assert resumed.first.digest() != straight.first.digest()


@pytest.mark.filterwarnings("ignore:.*callbacks used when the checkpoint was created")
def test_a_run_that_began_without_it_counts_from_where_it_is_resumed(fit, tmp_path):
    fit(s2ap(), ModelCheckpoint(tmp_path, filename="last"), enable_checkpointing=True)
    learner = s2ap()
    watch = Watch(learner)
    with pytest.warns(UserWarning, match="Expected the first masks in the checkpoint"):
        fit(learner, diagnostics(), watch, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    (metrics,) = watch.metrics
    assert metrics["stability/hamming"] == pytest.approx(watch.first.hamming(watch.masks[0]))


def test_it_measures_every_so_many_epochs_and_as_much_as_asked(fit):
    learner = plp.ScoreLearning(0.7)
    watch = Watch(learner)
    fit(diagnostics(every_n_epochs=2, rhos=()), learner, watch, max_epochs=3)
    names = {name for name in NAMES if "difference" not in name}
    assert [set(metrics) for metrics in watch.metrics] == [set(), names, names]


def test_what_makes_no_sense_is_refused(fit):
    with pytest.raises(plp.PruneError, match="one callback that learns scores, S2AP or ScoreLearning"):
        fit(diagnostics())
    with pytest.raises(plp.PruneError, match=r"found 2\. Leave ScoreSharpness out"):
        fit(diagnostics(), s2ap(), plp.ScoreLearning(0.7, name="other"))
    for bad in ({"every_n_epochs": 0}, {"iterations": 0}, {"rhos": (0.01, 0)}, {"rhos": 0.01}, {"samples": 8}):
        with pytest.raises(plp.PruneError, match="Expected"):
            plp.ScoreSharpness(**bad)


def test_frozen_biases_are_no_obstacle(fit):
    module, learner = Images(), plp.ScoreLearning(0.7)
    module.net[9].bias.requires_grad_(False)
    watch = Watch(learner)
    fit(diagnostics(), learner, watch, module=module)
    assert watch.metrics[-1].keys() == NAMES
    assert not module.net[9].bias.requires_grad


def test_it_pickles_and_is_written_in_yaml():
    pytest.importorskip("jsonargparse")
    from jsonargparse import ArgumentParser

    assert pickle.loads(pickle.dumps(diagnostics())).rhos == (0.01, 0.1)
    parser = ArgumentParser()
    parser.add_argument("--one", type=plp.ScoreSharpness)
    found = parser.parse_object({"one": {"class_path": "pl_prune.ScoreSharpness", "init_args": {"rhos": [0.5]}}})
    assert parser.instantiate_classes(found).one.rhos == (0.5,)


def test_ranks_measure_what_one_process_does(tmp_path):
    launch([Path(__file__).with_name("score_sharpness_job.py"), tmp_path])
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one.keys() == NAMES
    assert one == two
    assert one["sharpness/largest_eigenvalue"]
