from __future__ import annotations

import pytest
import torch
from fake_module import TinyModule
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.runs.lock import is_locked


def logger(tmp_path):
    return CSVLogger(tmp_path, name="logs", version="one")


def test_a_fit_is_recorded(fit, tmp_path):
    pruner = plp.PruneAtInit(sparsity=0.8)
    _, trainer = fit(plp.RunRecord(), pruner, logger=logger(tmp_path))
    run = plp.RunFolder(tmp_path / "logs" / "one")
    result = run.result()
    assert run.masks() == pruner.masks
    assert (result["sparsity"], result["epochs"], result["steps"], result["seed"]) == (0.8, 2, 8, 3)
    assert result["method"] == pruner.method
    assert result["masks"] == pruner.masks.digest()
    assert [(r["epoch"], r["step"]) for r in run.metrics()] == [(0, 4), (1, 8)]
    assert run.metrics()[-1]["val/loss"] == float(trainer.callback_metrics["val/loss"]) == result["metrics"]["val/loss"]
    assert 0 < result["pruning_seconds"] < result["seconds"]
    assert result["peak_bytes"] is None or result["peak_bytes"] > 10**6
    assert not is_locked(run.path / "lock")


def test_recording_changes_nothing(fit, tmp_path):
    a, _ = fit(plp.RunRecord(), plp.PruneAtInit(), logger=logger(tmp_path))
    b, _ = fit(plp.PruneAtInit())
    assert a.seen == b.seen
    for (name, one), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.filterwarnings(
    "ignore:Experiment logs directory", "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)
def test_a_run_that_stops_is_not_finished_and_goes_on(fit, tmp_path):
    class Boom(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("boom")

    saver = {"enable_checkpointing": True, "max_epochs": 4}
    run = plp.RunFolder(tmp_path / "logs" / "one")
    with pytest.raises(RuntimeError, match="boom"):
        fit(plp.RunRecord(), Boom(), ModelCheckpoint(save_last=True), logger=logger(tmp_path), **saver)
    assert not run.finished
    assert not is_locked(run.path / "lock")
    assert len(run.metrics()) == 2
    fit(plp.RunRecord(), ModelCheckpoint(save_last=True), logger=logger(tmp_path), ckpt_path=run.checkpoint, **saver)
    seconds = [r["seconds"] for r in run.metrics()]
    assert [r["step"] for r in run.metrics()] == [4, 8, 12, 16]
    assert seconds == sorted(seconds)
    assert run.result()["seconds"] >= seconds[-1]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_finished_run_and_one_that_is_held_are_refused(fit, tmp_path):
    run = plp.RunFolder(tmp_path / "logs" / "one")
    with run.locked(), expect_refusal("held by process"):
        fit(plp.RunRecord(), logger=logger(tmp_path))
    fit(plp.RunRecord(), logger=logger(tmp_path))
    with expect_refusal("found one in", "version"):
        fit(plp.RunRecord(), logger=logger(tmp_path))


@pytest.mark.parametrize("settings", [{"logger": False}, {"fast_dev_run": True}], ids=str)
def test_without_a_logger_nothing_is_written(fit, tmp_path, settings):
    fit(plp.RunRecord(), module=TinyModule(), **settings)
    assert not list(tmp_path.rglob("result.json"))


class Late(TinyModule):
    """Logs in its own `on_train_epoch_end`, which comes after that of callbacks."""

    def on_train_epoch_end(self):
        self.log("train/late", float(self.current_epoch))


def test_what_a_module_logs_last_is_of_its_own_epoch(fit, tmp_path):
    fit(plp.RunRecord(), module=Late(), logger=logger(tmp_path), max_epochs=3)
    run = plp.RunFolder(tmp_path / "logs" / "one")
    assert [(r["epoch"], r["train/late"]) for r in run.metrics()] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert run.result()["metrics"]["train/late"] == 2.0


@pytest.mark.filterwarnings(
    "ignore:Experiment logs directory", "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)
@pytest.mark.parametrize("when", ["before its line", "after its line"])
def test_a_resumed_run_keeps_what_its_last_validation_found(when, fit, tmp_path):
    class Boom(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise RuntimeError("boom")

    saver = {"enable_checkpointing": True, "max_epochs": 4, "check_val_every_n_epoch": 2}
    fit(plp.RunRecord(), ModelCheckpoint(save_last=True), logger=CSVLogger(tmp_path, "logs", "whole"), **saver)
    order = [Boom(), plp.RunRecord()] if when == "before its line" else [plp.RunRecord(), Boom()]
    with pytest.raises(RuntimeError, match="boom"):
        fit(*order, ModelCheckpoint(save_last=True), logger=logger(tmp_path), **saver)
    run = plp.RunFolder(tmp_path / "logs" / "one")
    fit(plp.RunRecord(), ModelCheckpoint(save_last=True), logger=logger(tmp_path), ckpt_path=run.checkpoint, **saver)
    lines = [
        [(r["epoch"], r["step"], r.get("val/loss")) for r in folder.metrics()]
        for folder in (run, plp.RunFolder(tmp_path / "logs" / "whole"))
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1][2] is not None
