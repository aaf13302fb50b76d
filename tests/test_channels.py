"""`benchmarks/channels.py`: what it writes is what shrinking by hand gives."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pl_prune as plp
from pl_prune.cli import PruneCLI

ROOT = Path(__file__).parents[1]
RECIPE = ["--config", str(ROOT / "recipes" / "quickstart.yaml"), "--trainer.callbacks=[]", "--model.network.width=4"]
RATIOS = [0.25, 0.5]


@pytest.fixture
def script(monkeypatch, tmp_path) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "benchmarks" / "channels.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DEVICE = torch.device("cpu")
    return module


def test_accuracies_costs_and_correlations_of_every_criterion(script, monkeypatch, capsys):
    options = ["--ratios", *map(str, RATIOS), "--per-class=3", "--draws=2", "--folder=out"]
    monkeypatch.setattr(sys, "argv", ["channels.py", *RECIPE, *options])
    script.main()
    found = json.loads(Path("out/results.json").read_text())
    assert list(found["accuracy"]) == [*script.CRITERIA, "random"]
    assert found["ratios"] == RATIOS
    assert "25% of the channels" in capsys.readouterr().out
    for name in ("without_finetuning", "magnitudes"):
        assert next(Path("out").rglob(f"{name}*.png")).stat().st_size > 0

    monkeypatch.setattr(sys, "argv", ["channels.py"])
    cli = script.Parsed(args=["fit", *RECIPE, "--trainer.logger=false", "--prune=null"])
    assert isinstance(cli, PruneCLI)
    model, data = cli.model.eval(), cli.datamodule
    data.setup("fit")
    tested = list(data.val_dataloader())
    groups = plp.trace_groups(model, tested[0][0][:2])
    units = plp.score_groups(model, plp.ByGroup(plp.Magnitude()), groups)
    assert found["dense"] == script.accuracy(model, tested)
    for i, ratio in enumerate(RATIOS):
        keep = plp.select_units(units, groups, 0.0, ratios={"*": ratio})
        small = plp.shrink(model, groups.expand(keep), tested[0][0][:2], groups)
        assert found["macs_left"][i] == groups.cost(keep)[1] / groups.cost({})[1]
        assert found["accuracy"]["L1"][i] == {"mean": script.accuracy(small, tested), "std": 0.0}
        assert found["accuracy"]["random"][i]["std"] >= 0
    for table in (found["rank_correlation"]["all"], found["rank_correlation"]["layers"]):
        assert [line[i] for i, line in enumerate(table)] == [pytest.approx(1.0)] * len(script.CRITERIA)
        assert table[0][1] == pytest.approx(table[1][0])
