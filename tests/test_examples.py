"""Projects that are not ours in style: each is pruned by adding lines alone, and both files run."""

from __future__ import annotations

import difflib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
PAIRS = sorted(p for p in EXAMPLES.rglob("*_pruned.*"))


def unpruned(path: Path) -> Path:
    return path.with_name(path.name.replace("_pruned", ""))


def run(monkeypatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def zeros(weights: dict, but: str) -> float:
    matrices = [w for name, w in weights.items() if w.ndim > 1 and not name.startswith(but)]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


def test_the_examples_are_found():
    assert [p.relative_to(EXAMPLES).as_posix() for p in PAIRS] == [
        "lightning_cli/config_pruned.yaml",
        "lightning_cli/main_pruned.py",
        "plain_script/train_pruned.py",
        "pytorch_loop/train_pruned.py",
    ]


@pytest.mark.parametrize("pruned", PAIRS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_lines_are_added_and_none_is_changed(pruned):
    lines = list(difflib.ndiff(unpruned(pruned).read_text().splitlines(), pruned.read_text().splitlines()))
    assert [line for line in lines if line.startswith("- ")] == []
    added = [line[2:] for line in lines if line.startswith("+ ") and line[2:].strip()]
    assert 0 < len(added) < 8
    assert "plp." in "".join(added) or "pl_prune" in "".join(added)


@pytest.mark.parametrize(("end", "asked"), [("", 0), ("_pruned", 0.9)])
def test_the_command_line_project(end, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(EXAMPLES / "lightning_cli" / f"config{end}.yaml")
    short = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    run(monkeypatch, f"lightning_cli/main{end}.py", "fit", "--config", config, *short)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert zeros(weights, "out") == pytest.approx(asked, abs=1e-3)


def test_a_sweep_reaches_the_callback_of_the_command_line_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "args.json").write_text(
        json.dumps({"prune.sparsity": 0.5, "prune.bn_warmup": "never", "prune.name": None})
    )
    files = ["--config", str(EXAMPLES / "lightning_cli" / "config_pruned.yaml"), "--config", "args.json"]
    short = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    run(monkeypatch, "lightning_cli/main_pruned.py", "fit", *files, *short)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert zeros(torch.load(checkpoint, weights_only=True)["state_dict"], "out") == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("end", "asked"), [("", 0), ("_pruned", 0.8)])
def test_the_script_with_a_trainer_of_its_own(end, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assignments = ["trainer.max_epochs=12", "trainer.enable_progress_bar=False", "model.hidden=64", "save_as=own.ckpt"]
    run(monkeypatch, f"plain_script/train{end}.py", *assignments)
    weights = torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]
    assert zeros(weights, "head") == pytest.approx(asked, abs=1e-3)
    if asked:
        assert json.loads((tmp_path / "runs/digits/report.json").read_text())["sparsity"] == pytest.approx(
            asked, abs=1e-3
        )


@pytest.mark.parametrize(("end", "asked"), [("", 0), ("_pruned", 0.7)])
def test_the_loop_of_plain_pytorch(end, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, f"pytorch_loop/train{end}.py", "--epochs=3", *([f"--sparsity={asked}"] if asked else []))
    assert zeros(torch.load(tmp_path / "digits.pt", weights_only=True), "4.") == pytest.approx(asked, abs=1e-3)
    assert float(capsys.readouterr().out.split()[-1]) > 0.7


PROJECT = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
for code, name in (("import pl_prune", "PruneAtInit"), ("", "pl_prune.PruneAtInit"), ("from pl_prune import PruneAtInit", "PruneAtInit")):
    exec(code)
    try:
        LightningCLI(BoringModel, args=["fit", f"--trainer.callbacks+={name}", "--print_config"])
    except SystemExit as end:
        print("exit", end.code)
"""


def test_a_project_that_does_not_import_the_classes_needs_the_full_class_path():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROJECT], capture_output=True, text=True, check=True)
    assert (
        "Expected a dot import path string: PruneAtInit" in done.stderr
    )  # of jsonargparse, before any code of ours runs
    assert re.findall(r"exit (\d)", done.stdout) == ["2", "0", "0"]
    assert "class_path: pl_prune.PruneAtInit" in done.stdout
