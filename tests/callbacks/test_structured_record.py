"""Structured pruning on record: scores and masks of units in the run's folder, in the report, on the page."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import pl_prune as plp
from pl_prune.report.html import write_report
from pl_prune.report.reading import read_run
from pl_prune.report.table import compare

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*num_workers")
SAMPLES = plp.Samples(per_class=4)


@pytest.mark.parametrize("shrink", [True, False], ids=["sliced", "masked"])
def test_units_are_recorded_and_reported(fit, tmp_path, shrink):
    pruner = plp.StructuredPruning(plp.Taylor(), 0.5, shrink=shrink, samples=SAMPLES)
    logger = CSVLogger(tmp_path, name="logs", version="one")
    module, _ = fit(pruner, plp.RunRecord(), plp.SparsityReport(), logger=logger, max_epochs=1)
    run = plp.RunFolder(tmp_path / "logs" / "one")
    groups, keep = pruner.units
    scores = plp.load_scores(run.path / "unit_scores.safetensors")
    assert plp.load_masks(run.path / "unit_masks.safetensors") == keep
    for root, score in pruner.unit_scores.items():
        assert torch.equal(scores[root], score)
        assert score[keep[root]].numel() == int(keep[root].sum())
    assert plp.read_header(run.path / "unit_scores.safetensors")["meta"]["criterion"]["class_path"].endswith("Taylor")
    report = json.loads((run.path / "report.json").read_text())
    assert report["units"]["layers"] == {root: list(counts) for root, counts in keep.counts().items()}
    assert report["units"]["sliced"] == shrink
    dense, left = groups.cost({}), groups.cost(keep)
    cost = report["units"]["cost"]
    assert (cost["params"], cost["macs"], cost["params_kept"], cost["macs_kept"]) == (*dense, *left)
    assert (report["cost"]["params"], report["cost"]["macs"]) == dense
    result = run.result()
    assert result["removed"] == report["removed"] == pytest.approx(1 - left[0] / dense[0] if shrink else 0.0)
    assert (result["sparsity"] == 0) == shrink
    if shrink:
        assert (report["cost"]["params_kept"], report["cost"]["macs_kept"]) == left
        assert left[0] == sum(p.numel() for p in module.parameters())
    else:
        assert left[0] < report["cost"]["params_kept"] < dense[0]  # columns that read what is zero are there
    text = write_report(run.path, tmp_path / "page").read_text()
    shown = read_run(run.path, result)
    assert shown.sliced == shrink
    if shrink:
        assert {x["name"]: (x["kept"], x["total"]) for x in shown.layers} == keep.counts()
        gone = sum(total - kept for kept, total in keep.counts().values())
        assert f"{gone} of {sum(groups.sizes.values())} output channels are gone" in text
    assert ("<h2>Layers</h2>" in text) != shrink
    assert ("Masked weights save neither" in text) != shrink
    assert "<h2>Units</h2>" in text
    assert (f"{result['removed']:.4f} of all parameters" in text) == shrink
    assert ("sliced off" in compare([run.path]).splitlines()[0]) == shrink
    for root, (kept, total) in keep.counts().items():
        assert root in text
        assert f"{kept} / {total}" in text
    assert "Scores of the entries" in text


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_files_of_a_fit_that_came_to_nothing_are_taken_away(fit, tmp_path):
    run = plp.RunFolder(tmp_path / "logs" / "one")
    run.keep_units({"a": torch.ones(2)}, plp.MaskSet({"a": torch.ones(2, dtype=torch.bool)}), {})
    fit(plp.RunRecord(), logger=CSVLogger(tmp_path, name="logs", version="one"), max_epochs=1)
    assert run.finished
    assert not list(run.path.glob("unit_*"))
