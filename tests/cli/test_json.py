"""Every command's `--json`: one document on the standard output, without NaN."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import yaml
from criteria_list import criteria

from pl_prune.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
TINY = ["--config", QUICKSTART, "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
TINY += ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
FOLDER = "runs/quickstart/snip"
TESTED = {"fit", "validate", "test", "predict", "inspect", "compare", "criteria", "doctor", "report", "study"}
ELSEWHERE = {
    "adversarial",
    "attack",
    "masks",
    "mask",
    "score",
    "transfer",
    "shrink",
    "export",
    "groups",
}  # tested beside their own text


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def said(capfd, *argv: str, status: int = 0):
    capfd.readouterr()
    assert main([*argv, "--json"]) == status
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=pytest.fail)


def test_every_command_is_tested_here_or_by_its_owner():
    assert {name for group in COMMANDS.values() for name in group} <= TESTED | ELSEWHERE


@pytest.mark.filterwarnings("ignore:.*expected a signal path")
def test_a_run_is_fitted_evaluated_compared_and_reported(capfd):
    fit = said(capfd, "fit", *TINY)
    assert fit["folder"] == FOLDER
    assert Path(fit["checkpoint"]).is_file()
    assert fit["result"] == json.loads(Path(FOLDER, "result.json").read_text())
    assert fit["metrics"] == fit["result"]["metrics"]
    assert 0 <= fit["metrics"]["val/acc"] <= 1

    kept = {name: Path(FOLDER, name).read_bytes() for name in ("config.yaml", "metrics.csv")}
    checkpoint = f"--ckpt_path={fit['checkpoint']}"
    assert said(capfd, "validate", *TINY, checkpoint)["metrics"] == pytest.approx({
        name: value for name, value in fit["metrics"].items() if name.startswith("val/")
    })
    assert set(said(capfd, "test", *TINY, checkpoint)["metrics"]) == {"test/acc", "test/loss"}
    assert said(capfd, "predict", *TINY, checkpoint)["batches"] == 1
    assert {name: Path(FOLDER, name).read_bytes() for name in kept} == kept  # the finished run is as it was

    (compared,) = said(capfd, "compare", FOLDER)
    assert compared["metrics"] == fit["metrics"]
    assert (compared["run"], compared["params_kept"], compared["params"]) == (FOLDER, 10983, 94186)
    report = said(capfd, "report", FOLDER)
    assert report == {"page": f"{FOLDER}/report.html", "metric": "val/acc", "direction": "maximize"}
    assert Path(report["page"]).is_file()


@pytest.mark.filterwarnings("ignore:.*expected a signal path")
def test_a_metric_that_is_not_finite_is_null(capfd):
    words = [*TINY, "--optimizer.lr=1e30", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    fit = said(capfd, "fit", *words, "--trainer.callbacks=null")
    assert (fit["folder"], fit["checkpoint"], fit["result"]) == (None, None, None)
    assert fit["metrics"]["val/loss"] is None


def test_inspect_tells_what_its_table_shows(capfd):
    report = said(capfd, "inspect", *TINY, "--prune.sparsity=0.99")
    assert report["method"] == "SNIP() at sparsity 0.99, Global()"
    assert sum(layer["kept"] for layer in report["layers"]) == 924
    for layer in report["layers"]:
        assert layer["density"] == layer["kept"] / layer["total"]
        assert layer["collapsed"] == (layer["kept"] == 0)
        assert layer["bottleneck"] == (layer["kept"] <= 0.2 * layer["total"])
    assert {"cost", "path", "zeros", "sparsity"} <= set(report)


def test_criteria_are_all_listed_with_their_settings(capfd):
    listed = {one["name"]: one for one in said(capfd, "criteria")}
    assert set(listed) == {type(one).__name__ for one in criteria()}
    assert listed["SynFlow"]["settings"] == [{"name": "rounds", "value": 100, "others": []}]
    assert listed["FisherTaylor"]["settings"][0]["others"] == ["removal"]
    assert listed["Magnitude"] == {
        "name": "Magnitude",
        "needs": "nothing",
        "gradients": False,
        "curvature": "none",
        "rounds": 1,
        "cost": "no pass",
        "compares_layers": True,
        "settings": [],
    }


def test_help_and_printed_configurations_stay_on_the_standard_output(capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", QUICKSTART, "--print_config", "--json"])
    assert yaml.safe_load(capfd.readouterr().out)["prune"]["init_args"]["sparsity"] == 0.9


@pytest.mark.filterwarnings("ignore:.*expected a signal path")
def test_a_study_tells_its_table_and_what_failed_and_ends_with_one(tmp_path, capfd):
    settings = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "trainer.accelerator": "cpu"}
    study = {
        "name": "s",
        "config": str(ROOT / "recipes" / "settings" / "convnet_digits.yaml"),
        "set": {**settings, "model.network.width": 4},
        "rows": {
            "good": {"config": str(ROOT / "recipes" / "pai" / "random.yaml")},
            "bad": {
                "config": str(ROOT / "recipes" / "pai" / "snip.yaml"),
                "set": {"prune.scores": "nowhere.safetensors"},
            },
        },
        "grid": {"prune.sparsity": [0.5]},
        "seeds": [0, 1],
    }
    Path("s.yaml").write_text(yaml.safe_dump(study))
    told = said(capfd, "study", "--config=s.yaml", status=1)
    assert (told["name"], told["metric"], told["direction"], told["left"]) == ("s", "val/acc", "maximize", 0)
    assert [record["row"] for record in told["results"]] == ["good", "good"]
    (row,) = told["table"]
    values = [record["last"] for record in told["results"]]
    assert row["last"] == values
    assert row["last_mean"] == pytest.approx(sum(values) / 2)
    assert row["last_std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert row["won"] is False
    assert len(told["failures"]) == 2
    for error in told["failures"].values():
        assert "nowhere.safetensors" in error
    assert said(capfd, "study", "--config=s.yaml", "--as-sweep")["method"] == "grid"
