from __future__ import annotations

import sys
from pathlib import Path

import fake_data
import pytest
import yaml

from pl_prune.__main__ import main

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "adversarial").glob("*.yaml"))
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SMALL = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


RUN = ("convnet_digits", "vgg16_svhn", "wrn28_4_cifar10")  # each network and each data set once


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem in RUN], ids=lambda p: p.stem)
def test_a_recipe_trains_adversarially(recipe, tmp_path, monkeypatch):
    config = yaml.safe_load(recipe.read_text())
    kind = config["data"]["class_path"].rpartition(".")[2]
    small = [*QUIET, *SMALL, "--data.batch_size=2", "--adversarial.loss.steps=1"]
    if kind == "CIFAR":
        fake_data.cifar(tmp_path / "data", monkeypatch, 10)
    elif kind == "SVHN":
        fake_data.svhn(tmp_path / "data", monkeypatch)
    if kind != "Digits":
        small += ["--data.workers=0"]
    assert main(["fit", "--config", str(recipe), *small]) == 0
    metrics = next(Path("runs").rglob("metrics.jsonl")).read_text()
    assert "adversarial/loss" in metrics


def test_recipes_are_those_of_the_paper():
    assert len(RECIPES) == 7
    for recipe in RECIPES:
        config = yaml.safe_load(recipe.read_text())
        loss = config["adversarial"]["init_args"]["loss"]
        assert loss["class_path"] == "pl_prune.TRADES"
        if recipe.stem != "convnet_digits":
            assert loss["init_args"]["eps"] == pytest.approx(8 / 255)
            assert loss["init_args"]["step_size"] == pytest.approx(2 / 255)
            assert config["trainer"]["max_epochs"] == config["lr_scheduler"]["init_args"]["T_max"] == 100
            assert config["data"]["init_args"]["standardise"] is False


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_print_config_parses_to_itself(recipe, capsys, tmp_path):
    def printed(config, *more):
        with pytest.raises(SystemExit, match="0"):
            main(["fit", f"--config={config}", *more, "--print_config"])
        return capsys.readouterr().out

    first = printed(recipe, "--adversarial.loss=PGDAT")
    (tmp_path / "resolved.yaml").write_text(first)
    again = yaml.safe_load(printed(tmp_path / "resolved.yaml"))
    assert again == yaml.safe_load(first)
    assert again["adversarial"]["init_args"]["loss"]["class_path"] == "pl_prune.PGDAT"


def test_normalisation_in_the_data_is_refused(tmp_path, monkeypatch, capsys):
    fake_data.cifar(tmp_path / "data", monkeypatch, 10)
    recipe = next(r for r in RECIPES if r.stem == "resnet18_cifar10")
    small = [*QUIET, *SMALL, "--data.batch_size=2", "--data.workers=0", "--data.standardise=true"]
    assert main(["fit", "--config", str(recipe), *small]) == 2
    said = capsys.readouterr().err
    assert "Expected images in [0, 1]" in said
    assert "NormalizedModel" in said


def test_any_recipe_can_be_made_adversarial(capsys):
    quickstart = RECIPES[0].parents[1] / "quickstart.yaml"
    with pytest.raises(SystemExit, match="0"):
        main([
            "fit",
            f"--config={quickstart}",
            "--adversarial.loss=FastAT",
            "--adversarial.loss.eps=0.1",
            "--print_config",
        ])
    adversarial = yaml.safe_load(capsys.readouterr().out)["adversarial"]
    assert adversarial["init_args"]["loss"]["class_path"] == "pl_prune.FastAT"
    assert adversarial["init_args"]["loss"]["init_args"]["eps"] == 0.1
