from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_data
import pytest
import torch
import yaml

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.models import ConvNet, ImageClassifier
from pl_prune.runs.stages import Stages

FOLDER = Path(__file__).parents[2] / "recipes" / "adversarial_pruning"
RECIPES = sorted(FOLDER.glob("*.yaml"))
GAMMAS = {  # S2AP, section 4.1
    "resnet18_cifar10": 0.001,
    "wrn28_4_cifar10": 0.001,
    "vgg16_cifar10": 0.0025,
    "vgg16_svhn": 0.0025,
    "resnet18_svhn": 0.0075,
    "wrn28_4_svhn": 0.005,
    "resnet50_imagenet": 0.0075,
    "vit_cifar10": 0.0025,
}
CHANNELS = {
    f"{network}_cifar10_channels_{times}x": (network, times) for network in ("resnet18", "vgg16") for times in (4, 15)
}
OWN = {"convnet_digits", "convnet_digits_s2ap", "convnet_mnist", "rlth_resnet18_cifar10"}
KEPT = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def resolved(capsys, words: list[str]) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_every_stage_file_is_found():
    assert {p.stem for p in RECIPES} == OWN | set(GAMMAS) | set(CHANNELS)
    assert {p.stem for p in FOLDER.glob("stages/*.yaml")} == {
        *("search", "finetune", "attack", "sharpness", "vit_cifar10", "resnet50_imagenet")
    }


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem in GAMMAS], ids=lambda p: p.stem)
def test_stages_are_those_of_the_paper(recipe, capsys):
    imagenet = recipe.stem == "resnet50_imagenet"
    stages = Stages.load(recipe)
    assert [spec.key for spec in stages.specs] == ["pretrain", "search", "finetune"][imagenet:]
    assert stages.evaluate == {"preset": "standard"}
    for spec in stages.specs:
        config = resolved(capsys, spec.words)
        epochs = {"pretrain": 100, "search": 10 if imagenet else 20, "finetune": 25 if imagenet else 100}[spec.key]
        assert config["trainer"]["max_epochs"] == config["lr_scheduler"]["init_args"]["T_max"] == epochs
        loss = config["adversarial"]["init_args"]["loss"]
        assert loss["class_path"] == ("pl_prune.FastAT" if imagenet else "pl_prune.TRADES")
        assert loss["init_args"]["eps"] == pytest.approx(8 / 255)
        if spec.key == "search":
            learned, optimizer = config["prune"]["init_args"], config["optimizer"]
            assert config["prune"]["class_path"] == "pl_prune.S2AP"
            assert (learned["gamma"], learned["warmup_epochs"]) == (GAMMAS[recipe.stem], 5)
            assert learned["learner"]["class_path"] == "pl_prune.HYDRA"
            assert optimizer["class_path"] == "torch.optim.SGD"
            chosen = {name: optimizer["init_args"][name] for name in ("lr", "momentum", "weight_decay")}
            assert chosen == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
        if spec.key == "finetune":
            awp = config["trainer"]["callbacks"][-1]
            assert (awp["class_path"], awp["init_args"]["gamma"]) == ("pl_prune.AWP", GAMMAS[recipe.stem])
            assert config["optimizer"]["init_args"]["lr"] == 0.01


def test_a_learner_is_chosen_by_options(capsys):
    more = {"search": {"prune.learner": "HARP", "optimizer.weight_decay": 0.0005, "prune.gamma": 0}}
    search = Stages.load(FOLDER / "resnet18_cifar10.yaml", more=more).specs[1]
    config = resolved(capsys, search.words)
    assert config["prune"]["init_args"]["learner"]["class_path"] == "pl_prune.HARP"
    assert config["prune"]["init_args"]["gamma"] == 0
    assert config["optimizer"]["init_args"]["weight_decay"] == 0.0005


def test_lottery_tickets_are_searched_over_random_weights(capsys):
    (search,) = Stages.load(FOLDER / "rlth_resnet18_cifar10.yaml").specs
    config = resolved(capsys, search.words)
    assert search.weights_of is None
    assert config["prune"]["init_args"]["learner"]["class_path"] == "pl_prune.RLTH"
    assert config["trainer"]["max_epochs"] == 20


def test_digits_run_in_three_stages(capsys):
    for name in ("convnet_digits", "convnet_digits_s2ap"):
        specs = Stages.load(FOLDER / f"{name}.yaml").specs
        assert [spec.key for spec in specs] == ["pretrain", "search", "finetune"]
        config = resolved(capsys, specs[1].words)
        assert config["prune"]["class_path"] == ("pl_prune.S2AP" if "s2ap" in name else "pl_prune.ScoreLearning")


@pytest.mark.parametrize("stem", CHANNELS)
def test_channels_are_searched_for_the_multiply_accumulates_of_the_paper(stem, capsys):
    network, times = CHANNELS[stem]
    pretrain, search, finetune = Stages.load(FOLDER / f"{stem}.yaml").specs
    config = resolved(capsys, search.words)
    learned = config["prune"]["init_args"]
    assert learned["channels"]["target"] == "macs"
    assert 0 <= learned["sparsity"] - (1 - 1 / times) < 1e-6
    assert learned["gamma"] == GAMMAS[f"{network}_cifar10"]
    assert pretrain.words == Stages.load(FOLDER / f"{network}_cifar10.yaml").specs[0].words
    assert finetune.words == Stages.load(FOLDER / f"{network}_cifar10.yaml").specs[2].words


def test_a_search_of_channels_is_fine_tuned_and_sliced_to_its_budget(tmp_path, capsys):
    """The stages of a recipe of channels, with the network and the data of another one, and `pl-prune export` at their end."""
    content = yaml.safe_load((FOLDER / "vgg16_cifar10_channels_4x.yaml").read_text())
    small = {
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 1,
    }
    content |= {
        "config": str(FOLDER.parent / "adversarial" / "convnet_digits.yaml"),
        "evaluate": {"eps": 0.1, "preset": "pgd", "images": 10},
    }
    for stage in content["stages"].values():
        stage["config"] = str(FOLDER / stage["config"]) if "config" in stage else []
        stage["set"] = {**stage.get("set", {}), **small, "adversarial.loss.steps": 1}
    content["stages"]["pretrain"]["set"]["trainer.callbacks"] = [KEPT]
    content["stages"]["search"]["set"] |= {"prune.warmup_epochs": 0, "prune.gamma": 0.01, "trainer.callbacks": [KEPT]}
    file = tmp_path / "channels.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["adversarial", "--config", str(file), "--folder", "arm", "--json"]) == 0
    _, search, finetune = json.loads(capsys.readouterr().out)["stages"]
    assert search["masks"] == finetune["masks"]
    checkpoint = finetune["checkpoint"]
    assert (
        main([
            "export",
            "--ckpt",
            checkpoint,
            "--format",
            "torch",
            "--out",
            "small.safetensors",
            "--repeats",
            "1",
            "--json",
        ])
        == 0
    )
    dense, masked, shrunk = json.loads(capsys.readouterr().out)["networks"]
    assert 0.2 * dense["macs"] < shrunk["macs"] <= 0.25 * dense["macs"]
    assert masked["nonzero"] >= shrunk["params"] >= shrunk["nonzero"]
    assert shrunk["max_rel"] < 1e-5
    network = ImageClassifier(ConvNet(width=8))
    small, tuned = (
        plp.load_shrunk(network, "arm/search/small.safetensors"),
        plp.load_shrunk(network, "small.safetensors"),
    )
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in tuned.named_parameters()}
    assert not torch.equal(small.network.head.weight, tuned.network.head.weight)


@pytest.mark.parametrize("stem", ["resnet50_imagenet", "vit_cifar10"])
def test_a_search_of_one_step_makes_masks(stem, tmp_path, monkeypatch):
    small = [
        "--data.root=data",
        "--data.batch_size=2",
        "--data.workers=0",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
    ]
    small += ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--prune.warmup_epochs=0"]
    small += [
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
    ]
    if stem == "resnet50_imagenet":
        fake_data.imagenet(tmp_path / "data")
        small += ["--data.size=32", "--model.network.network.depth=18"]
    else:
        network = "--model.network.network"
        small += [f"{network}.depth=2", f"{network}.width=48", f"{network}.heads=2", "--adversarial.loss.steps=1"]
        fake_data.cifar(tmp_path / "data", monkeypatch, 10)
    search = next(spec for spec in Stages.load(FOLDER / f"{stem}.yaml").specs if spec.key == "search")
    assert main(["fit", *search.words, *small, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"]) == 0
    result = json.loads(next(Path("runs").rglob("result.json")).read_text())
    assert result["sparsity"] == pytest.approx(0.5 if stem == "vit_cifar10" else 0.9, abs=1e-5)
