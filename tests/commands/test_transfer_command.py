from __future__ import annotations

import json
from pathlib import Path

import pytest

from pl_prune.__main__ import main

SETTINGS = Path(__file__).parents[2] / "recipes" / "settings" / "convnet_digits.yaml"
SHORT = "trainer: {accelerator: cpu, max_epochs: 1, limit_train_batches: 3, limit_val_batches: 1, num_sanity_val_steps: 0, callbacks: []}"
WIDER = """
model: {init_args: {num_classes: 12, network: {init_args: {num_classes: 12}}}}
data: {class_path: pl_prune.data.Digits, init_args: {seed: 1}}
"""


@pytest.fixture
def words(tmp_path):
    (tmp_path / "short.yaml").write_text(SHORT)
    (tmp_path / "wider.yaml").write_text(WIDER)
    files = ["--config", str(SETTINGS), "--config", str(tmp_path / "short.yaml")]
    targets = ["--targets", str(tmp_path / "wider.yaml"), "--criteria", "Magnitude", "--sparsity", "0.9"]
    return ["transfer", *files, *targets, "--folder", str(tmp_path / "out")]


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_transfer_goes_on_and_gives_indices_for_source_and_target(words, tmp_path, capsys, monkeypatch):
    from pl_prune.commands.study_run import StudyRun

    train, done = StudyRun.train, []

    def breaks_off(spec, run):
        if len(done) == 5:
            raise KeyboardInterrupt
        train(spec, run)
        done.append(spec.key)

    monkeypatch.setattr(StudyRun, "train", breaks_off)
    assert main([*words, "--seeds", "0", "1"]) == 130
    assert len(done) == 5
    capsys.readouterr()
    done.clear()
    monkeypatch.setattr(StudyRun, "train", lambda spec, run: (train(spec, run), done.append(spec.key)))
    assert main([*words, "--seeds", "0", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(c["dataset"], c["seeds"]) for c in told["cells"]] == [("source", [0, 1]), ("wider", [0, 1])]
    assert all(cell["same_masks"] and cell["dti"] == [0.0, 0.0] for cell in told["cells"])
    assert len(done) == 2 * 2 * 3 - 5  # the same mask is trained once, and nothing finished again
    assert json.loads((tmp_path / "out" / "transfer.json").read_text()) == told
    assert (tmp_path / "out" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    done.clear()
    assert main([*words, "--seeds", "0", "1"]) == 0
    assert done == []
    assert "DTI" in capsys.readouterr().out


def test_one_seed_is_refused_before_anything_is_made(words, tmp_path, capsys):
    assert main([*words, "--seeds", "0"]) == 2
    assert "two or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
