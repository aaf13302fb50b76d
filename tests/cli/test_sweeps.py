"""Every sweep file, literally, by wandb's own agent: what it starts, with which values, and what comes of it."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

import pl_prune as plp
from pl_prune.__main__ import main

pytest.importorskip("wandb")
from wandb_offline import offline_run, run_sweep

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
NOTHING_TO_SWEEP = {
    "Dense",
    "PredictionPanels",
    "RunRecord",
    "ScoreSharpness",
    "SparsityReport",
}
WATCHER = """import json, sys
print(json.dumps(sys.argv[1:]), file=open("started.jsonl", "a"))
"""
PROGRAM = """import sys
import torch
from pl_prune.__main__ import main
torch.set_num_threads(1)
sys.exit(main())
"""
TINY = {
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 0.5,
    "model.network.width": 8,
    "trainer.enable_progress_bar": False,
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


def program(text: str) -> Path:
    """Put something else in the place of pl-prune."""
    path = Path("bin").absolute()
    path.mkdir()
    (path / "pl_prune_program.py").write_text(text)
    (path / "pl-prune").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{path}/pl_prune_program.py" "$@"\n')
    (path / "pl-prune").chmod(stat.S_IRWXU)
    return path


def resolved(words: list[str], capsys: pytest.CaptureFixture) -> dict:
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def look_up(found, name: str):
    """Find what a dotted name reaches in a resolved configuration; the last item of a list, as a command line does."""
    for key in name.split("."):
        found = found["init_args"] if "init_args" in found and key not in found else found
        found = found[key][-1] if isinstance(found[key], list) else found[key]
    return found


def test_there_is_a_sweep_for_every_callback_that_has_something_to_choose(here):
    callbacks = {
        name for name in plp.__all__ if isinstance(cls := getattr(plp, name), type) and issubclass(cls, Callback)
    }
    swept = set()
    for sweep in SWEEPS:
        words = yaml.safe_load(sweep.read_text())["command"]
        files = [yaml.safe_load(Path(word).read_text()) for word in words if word.startswith("recipes/")]
        named = [f[key]["class_path"] for f in files for key in ("prune", "adversarial") if key in f]
        swept |= {name.rpartition(".")[2] for name in [*named, *words]} & callbacks
    assert callbacks - swept == NOTHING_TO_SWEEP


def test_what_the_agent_starts_means_what_the_sweep_says(here, capsys):
    path = program(WATCHER)
    for sweep in SWEEPS:
        config = yaml.safe_load(sweep.read_text())
        values = {
            name: p["values"][-(i % 2)] for i, (name, p) in enumerate(config["parameters"].items())
        }  # firsts and lasts
        run_sweep(config, [values], here, path)
        found = resolved(json.loads(Path("started.jsonl").read_text()), capsys)
        Path("started.jsonl").unlink()
        for name, value in values.items():
            got = look_up(found, name)
            got = got["class_path"].rpartition(".")[2] if isinstance(got, dict) else got
            assert (got, type(got)) == (value, type(value)), f"{sweep.name}: {name}"
    assert len(SWEEPS) == 11


def test_every_kind_of_value_arrives_as_what_it_is(here, capsys):
    config = yaml.safe_load((ROOT / "recipes" / "sweeps" / "quickstart.yaml").read_text())
    values = {
        **{"prune.select.first_layer": False, "trainer.enable_progress_bar": True, "prune.samples.per_class": None},
        **{
            "prune.samples.total": 20,
            "prune.sparsity": 0.85,
            "prune.bn_warmup": "never",
            "trainer.gradient_clip_val": None,
        },
        **{
            "prune.criterion": "pl_prune.GraSP",
            "prune.allocation": "ERK",
            "prune.select.exclude": ["network.features.0"],
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "amsgrad": True}},
    }
    run_sweep(config, [values], here, program(WATCHER))
    (line,) = Path("started.jsonl").read_text().splitlines()
    found = resolved(json.loads(line), capsys)
    classes = {
        "prune.criterion": "pl_prune.GraSP",
        "prune.allocation": "pl_prune.ERK",
        "optimizer": "torch.optim.AdamW",
    }
    for name, value in values.items():
        got = found
        for key in name.split("."):
            got = got["init_args"][key] if "init_args" in got and key not in got else got[key]
        if name in classes:
            assert got["class_path"] == classes[name]
        else:
            assert (got, type(got)) == (value, type(value)), name
    assert (found["optimizer"]["init_args"]["lr"], found["optimizer"]["init_args"]["amsgrad"]) == (0.001, True)


def test_runs_of_a_sweep_do_what_was_asked(here):
    config = yaml.safe_load((ROOT / "recipes" / "sweeps" / "quickstart.yaml").read_text())
    swept = {"prune.sparsity": 0.8, "prune.criterion": "Magnitude", "seed_everything": 1}
    run_sweep(config, [{**swept, **TINY}], here, program(PROGRAM))
    result = json.loads((here / "runs" / "pl_prune" / "run0" / "result.json").read_text())
    assert (result["sparsity"], result["seed"], result["epochs"]) == (pytest.approx(0.8, abs=1e-3), 1, 1)
    assert result["method"].startswith("Magnitude()")
    logged, history, _ = offline_run(here)
    assert {name: logged[name] for name in swept} == swept
    assert logged["prune.bn_warmup"] == "auto"  # a default
    assert not [name for name in logged if "init_args" in name or logged.get("prune") != "pl_prune.PruneAtInit"]
    assert history[-1]["trainer/global_step"] == 9


def test_two_processes_under_ddp_do_what_was_asked(here):
    config = yaml.safe_load((ROOT / "recipes" / "sweeps" / "quickstart.yaml").read_text())
    swept = {"prune.sparsity": 0.95, "prune.criterion": "SNIP", "trainer.devices": 2, "trainer.strategy": "ddp"}
    run_sweep(config, [{**swept, **TINY}], here, program(PROGRAM))
    folder = here / "runs" / "pl_prune" / "run0"
    result = json.loads((folder / "result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert result["steps"] == 5  # of 1,437 images in batches of 64, half of each rank's
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert (
        plp.MaskSet.from_zeros({k: weights[k] for k in plp.load_masks(folder / "masks.safetensors")}).sparsity() >= 0.94
    )
    logged, _, _ = offline_run(here)  # one run: the other rank starts none
    assert {name: logged[name] for name in swept} == swept


@pytest.mark.parametrize(
    ("key", "found", "meant"),
    [
        ("prune.sparsty", "'sparsty'", "'sparsity'"),
        ("prunes.sparsity", "'prunes'", "'prune'"),
        ("prune.criterion.temprature", "'temprature'", "It has none"),
    ],
)
def test_a_key_that_no_callback_has_is_answered_with_the_closest(key, found, meant, here, capfd):
    Path("args.json").write_text(json.dumps({key: 0.9}))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "recipes/quickstart.yaml", "--config", "args.json"])
    said = capfd.readouterr().err
    assert f"found {found}" in said
    assert meant in said
