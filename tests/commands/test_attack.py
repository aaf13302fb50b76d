from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.adversarial.corruptions import CORRUPTIONS
from pl_prune.data import Digits
from pl_prune.models import ConvNet, ImageClassifier

RECIPE = Path(__file__).parents[2] / "recipes" / "adversarial" / "convnet_digits.yaml"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.num_sanity_val_steps=0"]
ATTACK = ["--eps=0.1", "--preset=pgd", "--images=40", *QUIET]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the recipe, short, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pl-prune"])
        assert main(["fit", "--config", str(RECIPE), *QUIET, *SMALL]) == 0
    return folder / "runs" / "adversarial" / "convnet_digits"


def told(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main(["attack", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def module_of(checkpoint: Path) -> LightningModule:
    module = ImageClassifier(ConvNet(width=8))
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return module


def test_a_checkpoint_is_attacked_on_its_recipes_test_images(trained, here, capsys):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    (model,) = told(capsys, "--ckpt", str(checkpoint), *ATTACK)["models"]
    data = Digits()
    data.setup("test")
    chosen = plp.Samples(total=40).indices(data.test_set)
    x, y = (t[chosen] for t in (torch.stack([s[0] for s in data.test_set]), torch.stack([s[1] for s in data.test_set])))
    expected = plp.robust_accuracy(module_of(checkpoint), x, y, eps=0.1, preset="pgd")
    assert {key: model[key] for key in expected.to_dict()} == json.loads(json.dumps(expected.to_dict()))
    assert json.loads((trained / "robustness.json").read_text())["robust"] == expected.robust
    assert len(list((trained / "robustness").rglob("chunk_*.json"))) == 1


def test_two_checkpoints_are_compared_and_corruptions_counted(trained, here, tmp_path, capsys):
    other = tmp_path / "other.ckpt"
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"] = {name: -t if "head" in name else t for name, t in checkpoint["state_dict"].items()}
    torch.save(checkpoint, other)
    for name in CORRUPTIONS:
        np.save(tmp_path / f"{name}.npy", np.zeros((10, 8, 8, 1), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(10, np.int64))
    files = ["--ckpt", str(trained / "checkpoints" / "last.ckpt"), "--against", str(other)]
    more = ["--corruptions", str(tmp_path), "--picture", "bars.png", "--folder", str(tmp_path / "out")]
    found = told(capsys, *files, *ATTACK, *more)
    one, two = found["models"]
    assert found["comparison"]["difference"] == pytest.approx(one["robust"] - two["robust"])
    assert one["corruptions"]["mean"] in (0, 1)
    assert Path("bars.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "out" / "robustness").iterdir())) == 2
    assert main(["attack", *files, *ATTACK]) == 0
    text = capsys.readouterr().out
    assert "clean" in text
    assert "exact McNemar p" in text


def test_what_cannot_be_attacked(trained, here, tmp_path, capsys):
    checkpoint = tmp_path / "last.ckpt"
    shutil.copy(trained / "checkpoints" / "last.ckpt", checkpoint)
    for argv, said in (
        (["--ckpt", str(checkpoint)], "config.yaml"),
        (["--ckpt", str(checkpoint), "--config", str(RECIPE), "--eps=3"], "eps in (0, 1]"),
        (["--ckpt", "nowhere.ckpt", "--config", str(RECIPE), *QUIET], "nowhere.ckpt"),
    ):
        assert main(["attack", *argv]) == 2
        assert said in capsys.readouterr().err
