from __future__ import annotations

import json
from importlib import metadata

import pytest

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.report import doctor
from pl_prune.runs.plan import Plan
from pl_prune.runs.study import Study


def test_the_report_command_takes_metric_and_direction_from_the_study(tmp_path, capsys):
    plan = Plan(
        "s", {"a": {"config": []}, "b": {"config": []}}, {"prune.sparsity": [0.5]}, (0, 1), "val/loss", "minimize"
    )

    def train(spec, run):
        run.begin(0)
        value = {"a": 0.2, "b": 0.7}[spec.row] + 0.01 * spec.seed
        run.log({"epoch": 0, "step": 1, "seconds": 1.0, "val/loss": value})
        told = {
            "method": spec.row,
            "sparsity": 0.5,
            "masks": None,
            "seconds": 1.0,
            "pruning_seconds": 0.1,
            "peak_bytes": None,
        }
        run.finish({**told, "epochs": 1, "steps": 1, "metrics": {"val/loss": value}}, plp.MaskSet({}))

    Study(plan, tmp_path).work(train, lambda _: None)
    assert main(["report", str(tmp_path), "--json"]) == 0
    page = json.loads(capsys.readouterr().out)["page"]
    text = (tmp_path / "report.html").read_text()
    assert page == str(tmp_path / "report.html")
    assert "a won at sparsity 0.5" in text
    assert "val/loss" in text


def test_what_is_neither_a_study_nor_a_run_is_named(tmp_path, capfd):
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capfd.readouterr().err


def test_doctor_lists_what_is_there(capsys):
    status = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == (1 if found["problems"] else 0)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert {"cli", "report", "study", "robust"} <= set(found["extras"])
    assert found["extras"]["report"] == []
    main(["doctor"])
    assert "extra report complete" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"torch": "2.5.1"}, "torch 2.5.1: needed is >=2.6. Install that."),
        ({"lightning": "2.7.0", "pytorch-lightning": "2.7.0"}, "lightning 2.7.0: needed is <2.7,>=2.6. Install that."),
        ({"lightning": "2.6.1", "pytorch-lightning": "2.5.0"}, "lightning 2.6.1 beside pytorch-lightning 2.5.0"),
        ({"safetensors": ""}, "safetensors missing: needed is >=0.4.3. Install that."),
        ({"jsonargparse": "4.39.0"}, "jsonargparse 4.39.0: needed is <5,>=4.51. Run pip install 'pl_prune[cli]'."),
    ],
)
def test_doctor_names_what_will_not_work(monkeypatch, versions, said, capsys):
    true = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name, true(name)))
    assert main(["doctor"]) == 1
    assert said in capsys.readouterr().out
