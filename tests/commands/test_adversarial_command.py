from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.runs.folder import RunFolder, write_whole
from pl_prune.runs.stages import Stages, network, settings

RECIPE = str(Path(__file__).parents[2] / "recipes" / "adversarial" / "convnet_digits.yaml")
KEPT = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
FILE = {
    "name": "arm",
    "config": RECIPE,
    "set": {
        "trainer.callbacks": [KEPT],
        "trainer.limit_train_batches": 4,
        "trainer.limit_val_batches": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.max_epochs": 1,
        "model.network.width": 4,
        "adversarial.loss.steps": 2,
    },
    "evaluate": {"eps": 0.1, "preset": "pgd", "images": 30},
    "stages": {
        "pretrain": {},
        "search": {
            "set": {
                "prune": "S2AP",
                "prune.sparsity": 0.8,
                "prune.gamma": 0.01,
                "prune.warmup_epochs": 1,
                "prune.best": "batch_loss",
                "trainer.max_epochs": 3,
            }
        },
        "finetune": {"set": {"trainer.callbacks+": "AWP", "trainer.callbacks.gamma": 0.01, "optimizer.lr": 0.01}},
    },
}
KILLED = """
import os, signal, sys
import pl_prune as plp
from pl_prune.__main__ import main

plain = plp.S2AP.on_train_batch_start
def begin(self, trainer, *rest):
    if trainer.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, trainer, *rest)
plp.S2AP.on_train_batch_start = begin
main(["adversarial", "--config", "arm.yaml", "--folder", "killed"])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    Path("arm.yaml").write_text(yaml.safe_dump(FILE))


@pytest.fixture(scope="module")
def told(root):
    """The stages without a disturbance, in the folder `whole`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["pl-prune"])
        Path("arm.yaml").write_text(yaml.safe_dump(FILE))
        assert main(["adversarial", "--config", "arm.yaml", "--folder", "whole"]) == 0
    return json.loads((root / "whole" / "stages.json").read_text())


def state(file: str | Path) -> dict:
    return torch.load(file, weights_only=True)["state_dict"]


def lasting(content: dict) -> dict:
    """What a stage reached, without its times and places."""
    return {
        stage["stage"]: {key: stage[key] for key in stage if key not in ("folder", "checkpoint", "seconds")}
        for stage in content["stages"]
    }


def refused(capfd, *argv: str) -> str:
    capfd.readouterr()
    assert main(["adversarial", *argv]) == 2
    return capfd.readouterr().err


def test_each_stage_starts_from_the_one_before(told):
    pretrain, search, finetune = (RunFolder(f"whole/{name}") for name in ("pretrain", "search", "finetune"))
    masks = search.masks()
    assert masks.sparsity() == pytest.approx(0.8, abs=1e-3)
    assert any(name.endswith("head.weight") for name in masks)
    before, found, after = state(pretrain.checkpoint), state(network(search.path)), state(network(finetune.path))
    for name, mask in masks.items():
        assert torch.equal(found[name], before[name] * mask)  # weights stand still in the search
        assert torch.equal(after[name][~mask], torch.zeros(int((~mask).sum())))
        assert not torch.equal(after[name], found[name])  # and train in fine-tuning
    assert finetune.masks() == masks
    assert network(search.path).name == "best.ckpt"
    config = yaml.safe_load((finetune.path / "config.yaml").read_text())
    assert config["weights"] == "whole/search/best.ckpt"
    assert config["prune"]["init_args"]["masks"] == "whole/search/masks.safetensors"
    assert config["trainer"]["callbacks"][-1] == {
        "class_path": "pl_prune.AWP",
        "init_args": {"gamma": 0.01, "mode": "project", "warmup_epochs": 0},
    }


def test_accuracies_are_those_of_the_attack_before_and_after_fine_tuning(told):
    assert [stage["stage"] for stage in told["stages"]] == ["pretrain", "search", "finetune"]
    assert "robust" not in told["stages"][0]
    for stage in told["stages"][1:]:
        measured = json.loads(Path(stage["folder"], "robustness.json").read_text())
        assert (measured["eps"], measured["preset"], measured["total"]) == (0.1, "pgd", 30)
        assert (stage["clean"], stage["robust"]) == (measured["clean"], measured["robust"])
        assert stage["gap"] == stage["clean"] - stage["robust"]
        assert stage["robust_interval"][0] <= stage["robust"] <= stage["robust_interval"][1]


def test_a_search_that_was_killed_goes_on_and_ends_as_the_undisturbed_one(told, capfd):
    done = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert RunFolder("killed/pretrain").finished
    assert not RunFolder("killed/search").finished
    assert RunFolder("killed/search").checkpoint is not None
    written = Path("killed/pretrain/result.json").stat().st_mtime_ns
    capfd.readouterr()
    assert main(["adversarial", "--config", "arm.yaml", "--folder", "killed", "--json"]) == 0
    said = capfd.readouterr()
    assert "search: resumed" in said.err
    assert "pretrain" not in said.err
    assert Path("killed/pretrain/result.json").stat().st_mtime_ns == written
    assert lasting(json.loads(said.out)) == lasting(told)
    for one, other in zip(
        json.loads(said.out)["stages"], told["stages"], strict=True
    ):  # networks, norms and running statistics
        resumed, whole = state(one["checkpoint"]), state(other["checkpoint"])
        assert resumed.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(resumed[name], tensor), (one["stage"], name)


def test_the_same_command_again_trains_nothing_and_says_the_same(told, capfd):
    before = {file: file.stat().st_mtime_ns for file in Path("whole").rglob("*.ckpt")}
    assert before
    capfd.readouterr()
    assert main(["adversarial", "--config", "arm.yaml", "--folder", "whole"]) == 0
    out = capfd.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in Path("whole").rglob("*.ckpt")} == before
    assert json.loads(Path("whole/stages.json").read_text()) == told
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["pretrain", "search", "finetune"]
    assert f"{100 * told['stages'][2]['robust']:.2f} (" in lines[4]


def test_arms_share_a_pretrained_network(told):
    words = ["--weights", "whole/pretrain/checkpoints/last.ckpt", "--search.prune.gamma=0.01", "--folder", "shared"]
    Path("shared.yaml").write_text(
        yaml.safe_dump({**FILE, "stages": {"pretrain": {}, "search": FILE["stages"]["search"]}})
    )
    assert main(["adversarial", "--config", "shared.yaml", *words]) == 0
    assert RunFolder("shared/search").masks() == RunFolder("whole/search").masks()
    assert not Path("shared/pretrain").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--search.prune.sparsity=0.5"],
            ["'search' was run with, {'prune.sparsity': 0.8}", "{'prune.sparsity': 0.5}"],
        ),
        (["--seed=7"], ["'pretrain' was run with", "{'seed_everything': 7}"]),
        (["--weights=other.ckpt"], ["{'weights_of': 'pretrain'}", "{'weights_of': 'other.ckpt'}"]),
        (["--finetune.prune.spersity=1"], ["spersity"]),
        (["--sparsity=0.5"], ["found '--sparsity=0.5'", "--search.prune.sparsity=0.95"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) and v[0].startswith("--") else "",
)
def test_changed_and_mistyped_settings_are_refused(told, words, said, capfd):
    if words[0].startswith("--finetune"):  # settings of what is still to be done are parsed
        shutil.copytree("whole", "mistyped", dirs_exist_ok=True)
        shutil.rmtree("mistyped/finetune")
    folder = "mistyped" if words[0].startswith("--finetune") else "whole"
    err = refused(capfd, "--config", "arm.yaml", "--folder", folder, *words)
    for part in said:
        assert part in err


def test_a_stage_whose_source_is_gone_is_refused(told, capfd):
    shutil.copytree("whole", "gone", ignore=shutil.ignore_patterns("pretrain"))
    err = refused(capfd, "--config", "arm.yaml", "--folder", "gone")
    assert "Expected 'pretrain' to be finished, from which 'search' in 'gone' started" in err


def test_masks_of_another_model_are_refused(told, capfd):
    shutil.copytree("whole", "other", ignore=shutil.ignore_patterns("finetune"))
    masks = RunFolder("whole/search").masks()
    name = next(iter(masks))
    plp.save_masks("other/search/masks.safetensors", plp.MaskSet({**masks, name: torch.ones(3, 3, dtype=torch.bool)}))
    err = refused(capfd, "--config", "arm.yaml", "--folder", "other")
    assert name in err
    assert "other/search/masks.safetensors" in err


def test_a_search_without_masks_or_a_network_is_refused(tmp_path):
    stages = Stages.load("arm.yaml")
    finetune, search = stages.specs[2], tmp_path / "search"
    with expect_refusal("Expected masks of 'search'", "found none", "pl_prune.ScoreLearning"):
        stages.ready(finetune, tmp_path)
    write_whole(search / "config.yaml", "prune: {class_path: pl_prune.Dense}")
    plp.save_masks(search / "masks.safetensors", plp.MaskSet({"w": torch.ones(2, dtype=torch.bool)}))
    with expect_refusal("Expected the last checkpoint of 'search'", "found none", "Put it back"):
        stages.ready(finetune, tmp_path)
    write_whole(search / "result.json", json.dumps({"steps": 8}))
    (search / "checkpoints").mkdir()
    torch.save({"global_step": 4}, search / "checkpoints" / "last.ckpt")
    with expect_refusal("to be of step 8", "found step 4", "ModelCheckpoint"):  # its masks may be others
        stages.ready(finetune, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": {}}, ["Expected stages among pretrain, search, finetune", "found none"]),
        ({"stages": {"prune": {}}}, ["found 'prune'"]),
        ({"stages": {"search": {"prune": "S2AP"}}}, ["in stage 'search'", "found 'prune'"]),
        ({"weights": "robust.ckpt"}, ["Expected `weights` or the stage pretrain", "found both"]),
        ({"evaluate": {"epsilon": 0.1}}, ["found 'epsilon'", "'eps'"]),
        ({"evaluate": {"eps": 0}}, ["Expected an eps above 0"]),
        ({"evaluate": {"preset": "quick"}}, ["preset", "found 'quick'"]),
        ({"config": "nowhere.yaml"}, ["'nowhere.yaml'", "found none"]),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_a_stage_file_that_cannot_be_used_is_refused_before_any_work(change, said, capfd):
    Path("bad.yaml").write_text(yaml.safe_dump({**FILE, "name": "bad", **change}))
    err = refused(capfd, "--config", "bad.yaml")
    for part in said:
        assert part in err
    assert not Path("adversarial/bad").exists()


def test_settings_of_a_stage_that_is_not_there_are_refused():
    Path("alone.yaml").write_text(yaml.safe_dump({**FILE, "stages": {"search": {}}}))
    with expect_refusal("Expected settings of the stages search", "found some of 'finetune'"):
        Stages.load("alone.yaml", more=settings(["--finetune.optimizer.lr=0.1"]))


def test_a_stage_of_two_processes_is_one_stage_and_is_attacked_by_one(tmp_path):
    content = {**FILE, "stages": {"search": {"set": {**FILE["stages"]["search"]["set"], "trainer.max_epochs": 2}}}}
    content["set"] = {**FILE["set"], "trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.strategy": "ddp"}
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "pl_prune", "adversarial", f"--config={tmp_path / 'arm.yaml'}", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, f"--folder={tmp_path / 'arm'}"], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (stage,) = json.loads(done.stdout)["stages"]
    assert stage["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert 0 <= stage["robust"] <= stage["clean"] <= 1
    assert "MEMBER: 2/2" in (tmp_path / "arm" / "search" / "log.txt").read_text()
