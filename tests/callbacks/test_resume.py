"""A run that is killed and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_module import TinyModule, tiny_data, tiny_loader
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
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


class Loader(DataLoader):
    """A loader that can be resumed, as torchdata's: five batches in an order that the epoch decides, and a position."""

    def __init__(self):
        super().__init__(tiny_data(40), 8)
        self.epoch = self.position = 0

    def __iter__(self):
        if self.position == 5:
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < 5:
            self.position += 1
            yield self.collate_fn([self.dataset[i] for i in order[8 * self.position - 8 : 8 * self.position]])

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


def run(
    folder,
    pruner,
    *callbacks,
    ckpt_path=None,
    every=1,
    loader=Loader,
    seed=1,
    module=Steady,
    weights_only=None,
    **settings,
):
    """Train three epochs of five batches; return what a run ends with."""
    seed_everything(seed, verbose=False)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_last=True)
    settings = {"max_epochs": 3, "gradient_clip_val": 0.5, **settings}
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*([pruner] if pruner else []), *callbacks, saver], num_sanity_val_steps=1, **settings,
    )  # fmt: skip
    net = module()
    trainer.fit(net, loader(), tiny_loader(16), ckpt_path=ckpt_path, weights_only=weights_only)
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


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_validation_end"])
@pytest.mark.parametrize("pruner", ["at init", "gradual by gradients"])
def test_masks_from_data_are_the_same_after_a_crash(straight, tmp_path, pruner, hook):
    whole = straight(pruner)
    with pytest.raises(Killed):
        run(tmp_path, PRUNERS[pruner](), Kill(hook, 2))
    resumed = run(tmp_path, PRUNERS[pruner](), ckpt_path="last", seed=99)
    assert_same(resumed[0], whole[0])
    assert resumed[1] == whole[1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
def test_a_killed_process_leaves_no_difference(straight, tmp_path):
    kills = [
        ("gradual", "on_train_batch_start", 7),
        ("rewound", "on_before_optimizer_step", 9),
        ("gradual", "on_validation_start", 2),
    ]
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, tmp_path / hook, pruner, hook, str(call)], env=env, stderr=subprocess.DEVNULL
        )
        for pruner, hook, call in kills
    ]
    for job, (pruner, hook, _) in zip(jobs, kills, strict=True):
        assert job.wait(timeout=120) == -signal.SIGKILL
        whole = straight(pruner, every=2)
        resumed = run(tmp_path / hook, PRUNERS[pruner](), ckpt_path=tmp_path / hook / "last.ckpt", every=2)
        assert_same(resumed[0], whole[0])
        assert resumed[1] == whole[1]
        assert 0 < len(resumed[2]) < 15


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists",
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint that ended",
)
@pytest.mark.parametrize("call", [3, 8])
def test_with_an_ordinary_loader_it_is_a_dense_run_under_the_same_interruption(tmp_path, call):
    def interrupted(name, pruner):
        def loader():
            return DataLoader(tiny_data(40), 8, shuffle=True)

        with pytest.raises(Killed):
            run(tmp_path / name, pruner, Kill("on_after_backward", call), loader=loader, every=2)
        return run(tmp_path / name, type(pruner)(**arguments[name]), ckpt_path="last", loader=loader, every=2, seed=4)

    nothing, something = plp.OneShot(0.0, start=2), plp.Cubic(final=0.8, start=1, end=8, every=2)
    arguments = {
        "dense": {}, "init": {"sparsity": 0.0, "bn_warmup": "never"}, "none": {"schedule": nothing}, "gradual": {"schedule": something},
        "pruned": {"sparsity": 0.8},
    }  # fmt: skip
    dense = interrupted("dense", plp.Dense())
    for name, kind in (("init", plp.PruneAtInit), ("none", plp.GradualPruning)):
        same = interrupted(name, kind(**arguments[name]))
        assert_same(same[0], dense[0])
        assert same[2] == dense[2]
    for name, kind in (("pruned", plp.PruneAtInit), ("gradual", plp.GradualPruning)):
        assert interrupted(name, kind(**arguments[name]))[2] == dense[2]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
def test_the_checkpoint_loads_with_weights_only(straight, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, PRUNERS["rewound"](), Kill("on_train_batch_end", 6))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["GradualPruning"]["origin"]
    resumed = run(tmp_path, PRUNERS["rewound"](), ckpt_path="last", weights_only=True)
    assert_same(resumed[0], straight("rewound")[0])


@pytest.fixture
def checkpoint(tmp_path):
    run(tmp_path, PRUNERS["gradual"](), every=2)
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_other_entry_points_keep_the_zeros(checkpoint, entry):
    class Module(Steady):
        test_step = TinyModule.validation_step

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    module, pruner = Module(), PRUNERS["gradual"]()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[pruner]
    )
    getattr(trainer, entry)(module, tiny_loader(16), ckpt_path=checkpoint)
    saved = plp.MaskSet.from_state_dict(torch.load(checkpoint)["callbacks"]["GradualPruning"]["masks"])
    assert plp.MaskSet.from_zeros({name: module.get_parameter(name) for name in saved}) == saved
    assert saved.sparsity() == 0.8


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
def test_another_configuration_is_refused(checkpoint):
    others = {
        "final=0.7": plp.GradualPruning(schedule=plp.Cubic(final=0.7, start=1, end=8, every=2)),
        "Linear": plp.GradualPruning(schedule=plp.Linear(final=0.8, start=1, end=8, every=2)),
        "rewound to step 1": plp.GradualPruning(schedule=plp.Cubic(final=0.8, start=1, end=8, every=2), rewind_to=1),
        "exclude=['net.0']": plp.GradualPruning(
            schedule=plp.Cubic(final=0.8, start=1, end=8, every=2), select=plp.Select(exclude=["net.0"])
        ),
        "per_class=3": plp.GradualPruning(
            schedule=plp.Cubic(final=0.8, start=1, end=8, every=2), samples=plp.Samples(per_class=3)
        ),
        "'GradualPruning[other]'": plp.GradualPruning(name="other"),
        "'PruneAtInit'": plp.PruneAtInit(),
    }
    for part, other in others.items():
        with expect_refusal("Cubic(final=0.8" if "Pr" not in part else "GradualPruning", part):
            run(checkpoint.parent, other, ckpt_path=checkpoint)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda s: s.pop("steps"), ("'GradualPruning'", "'steps'", "another checkpoint")),
        (lambda s: s.update(steps="many"), ("'GradualPruning'", "many")),
        (lambda s: s.update(origin=7), ("'GradualPruning'", "damaged")),
        (lambda s: s.pop("masks"), ("'GradualPruning'", "'steps'")),
        (lambda s: s["masks"].pop("bits"), ("damaged or foreign",)),
        (lambda s: s["masks"]["bits"].update({"net.0.weight": torch.zeros(3, dtype=torch.uint8)}), ("3 bytes",)),
        (lambda s: s["masks"]["bits"].pop("net.0.weight"), ("net.0.weight",)),
        (lambda s: s.update(pl_prune=9), ("version 9",)),
        (lambda s: s["masks"]["shapes"].update({"net.0.weight": [2, 1, 6, 6]}), ("net.0.weight", "mask (2, 1, 6, 6)")),
        (lambda s: s.clear(), ("no such state",)),
    ],
    ids=range(10),
)
def test_damaged_state_is_named(checkpoint, damage, parts):
    saved = torch.load(checkpoint)
    damage(saved["callbacks"]["GradualPruning"])
    torch.save(saved, checkpoint)
    with expect_refusal(*parts):
        run(checkpoint.parent, PRUNERS["gradual"](), ckpt_path=checkpoint)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
def test_weights_that_contradict_their_masks_are_named(checkpoint):
    saved = torch.load(checkpoint)
    saved["state_dict"]["net.6.weight"] += 1
    torch.save(saved, checkpoint)
    with pytest.warns(UserWarning, match=r"last.ckpt' prune; found other weights in net.6.weight"):
        run(checkpoint.parent, PRUNERS["gradual"](), ckpt_path=checkpoint, max_epochs=4)


class Own(Steady):
    """Has a mistake of its own, in `setup` or while it loads."""

    mistake = ""

    def setup(self, stage):
        if self.mistake == "setup":
            raise ValueError("my data path is wrong")

    def on_load_checkpoint(self, checkpoint):
        if self.mistake == "load":
            raise KeyError("my own key")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
def test_a_users_own_mistakes_are_not_blamed_on_the_file(checkpoint):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=4,
        enable_checkpointing=False, callbacks=[PRUNERS["gradual"]()],
    )  # fmt: skip
    module = Own()
    module.mistake = "load"
    with pytest.raises(KeyError, match="my own key"):
        trainer.fit(module, Loader(), tiny_loader(16), ckpt_path=checkpoint)
    module.mistake = ""
    trainer.fit(module, Loader(), tiny_loader(16), ckpt_path=checkpoint)
    module.mistake = "setup"
    with pytest.raises(ValueError, match="my data path"):
        trainer.fit(module, Loader(), tiny_loader(16))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with expect_refusal("nowhere.ckpt", "no such file"):
        run(tmp_path, PRUNERS["gradual"](), ckpt_path=tmp_path / "nowhere.ckpt")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")
@pytest.mark.parametrize("content", ["cut", "empty", "text", "foreign"])
def test_a_broken_file_is_named(checkpoint, content):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(
        {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint", "foreign": whole}[content]
    )
    if content == "foreign":
        torch.save({"weights": torch.ones(2)}, checkpoint)
    with expect_refusal("last.ckpt", "cannot be read"):
        run(checkpoint.parent, PRUNERS["gradual"](), ckpt_path=checkpoint)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, pruner, hook, call = sys.argv[1:]
    run(Path(folder), PRUNERS[pruner](), Kill(hook, int(call), by_signal=True), every=2)
