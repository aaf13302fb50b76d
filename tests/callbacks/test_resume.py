"""A run that is killed and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyModule, tiny_data, tiny_loader
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from refusal import expect_refusal
from torch import nn
from torch.utils.data import DataLoader

import pl_prune as plp


class Steady(TinyModule):
    """No randomness while it trains."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__("adamw")
        self.net[7] = nn.Identity()


class Loader:
    """A loader that can be resumed: batches in an order that the epoch decides, and a position."""

    def __init__(self):
        self.epoch = self.position = 0

    def __len__(self):
        return 5

    def __iter__(self):
        x, y = tiny_data().tensors
        order = torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch))
        while self.position < 5:
            chosen = order[8 * self.position : 8 * self.position + 8]
            self.position += 1
            yield x[chosen], y[chosen]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


PRUNERS = {
    "at init": lambda: plp.PruneAtInit(plp.HutchinsonPruning(probes=2), 0.8),
    "gradual": lambda: plp.GradualPruning(schedule=plp.Cubic(final=0.8, start=1, end=8, every=2)),
    "gradual by gradients": lambda: plp.GradualPruning(plp.SNIP(), plp.Linear(final=0.8, start=2, end=8, every=3)),
    "rewound": lambda: plp.GradualPruning(schedule=plp.Exponential(final=0.8, start=2, end=8, every=3), rewind_to=1),
}
HOOKS = [
    "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_end", "on_train_epoch_end",
]  # fmt: skip
# A hook and the how manieth call of it that fails. Masks change before steps 1, 3, 5, 7, 8 or 2, 5, 8 of at most 12.
KILLS = [(hook, call) for hook in HOOKS[1:7] for call in (2, 4, 6, 9)] + [(hook, 2) for hook in (HOOKS[0], *HOOKS[7:])]


class Killed(RuntimeError):
    pass


class Kill(Callback):
    """Fails, or kills its own process, in the middle of a fit."""

    def __init__(self, hook, call, by_signal=False):
        self.left, self.by_signal = call, by_signal
        setattr(self, hook, self._called)

    def _called(self, trainer, *_):
        if trainer.sanity_checking:
            return
        self.left -= 1
        if not self.left:
            if self.by_signal:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed


def run(folder, pruner, *callbacks, ckpt_path=None, every=1, loader=Loader, seed=1, module=Steady, **settings):
    """Train three epochs of five batches; return what a run ends with."""
    seed_everything(seed, verbose=False)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_last=True)
    settings = {"max_epochs": 3, "gradient_clip_val": 0.5, **settings}
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*([pruner] if pruner else []), *callbacks, saver], num_sanity_val_steps=1, **settings,
    )  # fmt: skip
    net = module()
    trainer.fit(net, loader(), tiny_loader(16), ckpt_path=ckpt_path)
    state = {**net.state_dict()}
    for i, values in enumerate(trainer.optimizers[0].state.values()):
        state.update({f"optimizer {i} {key}": torch.as_tensor(value).clone() for key, value in values.items()})
    return state, pruner.masks if pruner else None, net.seen


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    known = {}

    def get(name, **settings):
        key = name, str(settings)
        if key not in known:
            torch.set_num_threads(1)
            known[key] = run(tmp_path_factory.mktemp("straight"), PRUNERS[name](), **settings)
        return known[key]

    return get


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
@pytest.mark.parametrize("pruner", ["gradual", "rewound"])
@pytest.mark.parametrize(("hook", "call"), KILLS, ids=lambda v: str(v))
def test_a_crash_anywhere_leaves_no_difference(straight, tmp_path, pruner, hook, call):
    every = 1 + call % 2  # the last checkpoint is at the last step, or one step older
    settings = {"accumulate_grad_batches": 2 if call in (4, 9) else 1}
    whole = straight(pruner, every=every, **settings)
    with pytest.raises(Killed):
        run(tmp_path, PRUNERS[pruner](), Kill(hook, call), every=every, **settings)
    last = tmp_path / "last.ckpt"
    resumed = run(
        tmp_path, PRUNERS[pruner](), ckpt_path=last if last.exists() else None, every=every, seed=1, **settings
    )
    assert_same(resumed[0], whole[0])
    assert resumed[1] == whole[1]
    assert resumed[1].sparsity() == 0.8
    assert resumed[2] == whole[2][-len(resumed[2]) :]
