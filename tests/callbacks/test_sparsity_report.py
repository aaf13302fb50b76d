from __future__ import annotations

import csv
import json

import pytest
import torch
from fake_module import TinyModule
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

import pl_prune as plp
from pl_prune.report.table import compare


def test_report_file_counts_what_the_masks_keep_and_the_weights_show(fit, tmp_path):
    pruner = plp.PruneAtInit(sparsity=0.75)
    module, _ = fit(pruner, plp.SparsityReport(str(tmp_path / "run")))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    everything = sum(p.numel() for p in module.parameters())
    assert report["sparsity"] == 0.75
    assert report["zeros"] == 1350
    assert report["cost"]["params"] == everything
    assert report["cost"]["params_kept"] == everything - 1350
    by_hand = 8 * 9 * 64 + 8 * 8 * 9 * 9 + 72 * 16 + 16 * 4
    assert report["cost"]["macs"] == by_hand
    kept = {layer["name"]: layer["kept"] for layer in report["layers"]}
    assert (
        report["cost"]["macs_kept"] == kept["net.0.weight"] * 64 + kept["net.3.weight"] * 9 + kept["net.6.weight"] + 64
    )
    assert report["path"] is True
    assert set(report["metrics"]) == {"loss", "val/loss"}


def test_the_table_and_the_loggers_say_the_same(fit, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("pl_prune.callbacks.report.rank_zero_info", said.append)
    logger = CSVLogger(tmp_path, name="logs", version="one")
    fit(plp.SparsityReport(), plp.PruneAtInit(sparsity=0.75), logger=logger, log_every_n_steps=1)
    (text,) = said
    assert "450 of 1,800 kept (sparsity 0.7500); 1,350 zeros measured" in text
    assert "path input to output  yes" in text
    logged = (tmp_path / "logs" / "one" / "metrics.csv").read_text()
    assert "sparsity/prunable" in logged
    assert "0.75" in logged
    assert (tmp_path / "logs" / "one" / "report.json").is_file()


def test_masks_that_changed_are_shown_again_at_the_end(fit, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("pl_prune.callbacks.report.rank_zero_info", said.append)
    logger = CSVLogger(tmp_path, name="logs", version="one")
    pruner = plp.GradualPruning(schedule=plp.Linear(final=0.75, start=1, end=5, every=2))
    fit(pruner, plp.SparsityReport(), logger=logger, log_every_n_steps=1)
    before, after = said
    assert "1,800 of 1,800 kept (sparsity 0.0000); 0 zeros measured" in before
    assert "450 of 1,800 kept (sparsity 0.7500); 1,350 zeros measured" in after
    assert "Magnitude() by Linear(final=0.75, start=1, end=5, every=2), Global()" in after
    rows = list(csv.DictReader((tmp_path / "logs" / "one" / "metrics.csv").read_text().splitlines()))
    levels = [(int(row["step"]), float(row["sparsity/prunable"])) for row in rows if row["sparsity/prunable"]]
    assert levels == [(0, 0.0), (3, 0.375), (5, 0.75)]


def test_a_cut_network_is_said_to_have_no_path(fit, tmp_path):
    masks = plp.Global()(plp.score(TinyModule(), plp.Random()), 0.5)
    cut = plp.MaskSet({name: keep & (name != "net.3.weight") for name, keep in masks.items()})

    class Cut(plp.PruneAtInit):
        def make_masks(self, bridge):
            return cut

    fit(Cut(), plp.SparsityReport(str(tmp_path)))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["path"] is False
    assert [layer["name"] for layer in report["layers"] if layer["kept"] == 0] == ["net.3.weight"]


def test_weights_written_behind_the_optimizer_are_found(fit):
    class Writer(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                pl_module.net[3].weight.fill_(1.0)

    with pytest.raises(plp.PruneError, match=r"zeros wherever the masks prune; found other weights in net.3.weight"):
        fit(plp.PruneAtInit(), Writer(), plp.SparsityReport())


def test_reporting_changes_nothing(fit):
    with_report, _ = fit(plp.PruneAtInit(), plp.SparsityReport())
    without, _ = fit(plp.PruneAtInit())
    assert with_report.seen == without.seen
    for (name, a), (_, b) in zip(with_report.state_dict().items(), without.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_latency_is_measured_where_it_is_asked_for_and_changes_nothing(fit, tmp_path):
    asked, _ = fit(plp.PruneAtInit(sparsity=0.75), plp.SparsityReport(str(tmp_path / "asked"), latency=True))
    plain, _ = fit(plp.PruneAtInit(sparsity=0.75), plp.SparsityReport(str(tmp_path / "plain")))
    for (name, a), (_, b) in zip(asked.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert asked.seen == plain.seen
    found = json.loads((tmp_path / "asked" / "report.json").read_text())["latency"]
    assert (found["batch"], found["threads"], found["repeats"]) == (2, 1, 20)
    assert found["device"].startswith("cpu (")
    for kind in ("dense", "masked"):
        low, middle, high = found[kind]
        assert 0 < low <= middle <= high
    assert "latency" not in json.loads((tmp_path / "plain" / "report.json").read_text())


def test_compare_sets_runs_side_by_side(fit, tmp_path):
    fit(plp.Dense(), plp.SparsityReport(str(tmp_path / "dense")))
    fit(plp.PruneAtInit(sparsity=0.9), plp.SparsityReport(str(tmp_path / "snip")))
    lines = compare([tmp_path / "dense", tmp_path / "snip"]).splitlines()
    assert lines[0].split()[:2] == ["run", "sparsity"]
    assert lines[0].split()[-1] == "val/loss"
    assert lines[2].split()[1] == "0.0000"
    assert lines[3].split()[1] == "0.9000"
    with pytest.raises(plp.PruneError, match="no such folder"):
        compare([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(plp.PruneError, match="Add the callback SparsityReport"):
        compare([tmp_path / "empty"])
