from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.commands.progress import gpu_shares
from pl_prune.commands.study_run import _told_by
from pl_prune.core.types import PruneError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(tmp_path):
    nothing = {"prune.select": {"class_path": "Select", "init_args": {"include": ["nothing.*"]}}}
    content = {
        "name": "ddp",
        "config": "recipes/settings/convnet_digits.yaml",
        "set": {"trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_epochs": 2,
                "model.network.width": 4},
        "rows": {"SNIP": {"config": "recipes/pai/snip.yaml"}, "odd": {"config": "recipes/pai/snip.yaml", "set": nothing}},
        "grid": {"prune.sparsity": [0.9]},
    }  # fmt: skip
    file = tmp_path / "ddp.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_run_of_several_processes_is_one_run_and_its_refusal_is_heard(study, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["study", f"--config={study}", f"--folder={tmp_path / 's'}", "--json"]) == 1
    told = json.loads(capfd.readouterr().out)
    assert [r["key"] for r in told["results"]] == ["SNIP_sparsity=0.9_seed=0"]
    said = told["failures"]["odd_sparsity=0.9_seed=0"]
    assert said.startswith(
        "PruneError: Expected every pattern to match a prunable layer; found nothing for 'nothing.*'"
    )
    assert "PruneError" in (tmp_path / "s" / "runs" / "odd_sparsity=0.9_seed=0" / "log.txt").read_text()
    run = plp.RunFolder(tmp_path / "s" / "runs" / "SNIP_sparsity=0.9_seed=0")
    assert [record["epoch"] for record in run.metrics()] == [0, 1]
    assert run.result()["steps"] == 2 * 10  # of an epoch's 20 batches, which the ranks share
    assert run.masks().sparsity() == pytest.approx(0.9, abs=1e-3)
    assert (run.path / "report.json").is_file()
    assert run.checkpoint is not None


def test_a_study_that_was_started_several_times_over_is_refused(study, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", f"--config={study}", f"--folder={tmp_path / 's'}"]) == 2
    assert "found that 2 were started together, as by torchrun" in capfd.readouterr().err


def test_the_cause_is_found_in_what_several_processes_say():
    lines = "Traceback\n[rank1]: pl_prune.core.types.PruneError: Expected a; found b. Do c.\n[rank: 1] Child process terminated\n"
    error = _told_by(lines, 1)
    assert isinstance(error, PruneError)
    assert str(error) == "Expected a; found b. Do c."
    assert str(_told_by("Traceback\nValueError: diverged\n", 1)) == "ValueError: diverged"
    assert "status -9" in str(_told_by("", -9))


@pytest.mark.parametrize(
    ("seen", "count", "shares"),
    [
        ("0,1,2,3", 2, ["0,2", "1,3"]),
        ("4,5", 3, ["4", "5", "4"]),
        ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]),
        ("7", 2, [None, None]),
    ],
)
def test_workers_share_the_gpus(seen, count, shares, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert [own.get("CUDA_VISIBLE_DEVICES") for own in gpu_shares(count)] == shares
