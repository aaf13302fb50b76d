"""Recipes of HESSO: each runs, and leaves the units that it asks for."""

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

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "hesso"
METHODS = ["hesso", "hesso_cric", "one_shot", "random"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SMALL = ["--trainer.limit_val_batches=1", "--trainer.max_epochs=1", "--data.batch_size=2"]
STEPS = ["--prune.unit=steps", "--prune.start=1", "--prune.duration=2", "--prune.periods=2"]
pytestmark = pytest.mark.filterwarnings("ignore:Starting from v1.9.0", "ignore:The dirpath has changed")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def result(folder: Path) -> dict:
    (file,) = folder.rglob("result.json")
    return json.loads(file.read_text())


def test_every_recipe_is_here():
    found = {p.stem for p in RECIPES.glob("*.yaml") if not p.stem.startswith(("bert", "carn", "causal", "detection"))}
    assert found == {*METHODS, "resnet18_cifar10", "vgg16_cifar10", "resnet50_imagenet", "mobilenet_v3"}


@pytest.mark.filterwarnings("ignore:ModelCheckpoint keeps the best")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_writes_the_smaller_network_and_tests_its_checkpoint(method, tmp_path):
    files = [f"--config={RECIPES / method}.yaml", f"--config={ROOT / 'recipes/settings/convnet_digits.yaml'}"]
    limits = ["--trainer.limit_train_batches=12", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    cric = ["--prune.cric.sampling_steps=2", "--prune.cric.max_cycles=2"] if method == "hesso_cric" else []
    assert main(["fit", *files, *QUIET, *limits, *STEPS, *cric]) == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert main(["test", *files, *QUIET, "--trainer.limit_test_batches=1", f"--ckpt_path={checkpoint}"]) == 0
    (small,) = tmp_path.rglob("small.safetensors")
    network = plp.load_shrunk(ImageClassifier(ConvNet(), 10), small)
    groups = plp.trace_groups(ConvNet(), torch.randn(1, 1, 8, 8))
    units = sum(groups.sizes.values())
    left = plp.trace_groups(network.network, torch.randn(1, 1, 8, 8)).sizes.values()
    assert units - sum(left) == round(0.7 * units)
    metrics = result(tmp_path)["metrics"]
    assert metrics["group_sparsity"] == pytest.approx(round(0.7 * units) / units)
    assert metrics["hesso/params"] == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("recipe", "depth", "units"), [("resnet18_cifar10", 20, 448), ("vgg16_cifar10", 16, 4224)])
def test_the_tutorials_recipes_run(recipe, depth, units, tmp_path, monkeypatch):
    """On networks of the family that are quicker to trace and to save."""
    fake_data.cifar(tmp_path / "data", monkeypatch, 10)
    limits = [
        f"--model.network.depth={depth}",
        "--trainer.limit_train_batches=4",
        "--data.workers=0",
        "--prune.shrink_at_end=false",
    ]
    assert main(["fit", f"--config={RECIPES / recipe}.yaml", *QUIET, *SMALL, *limits, *STEPS]) == 0
    metrics = result(tmp_path)["metrics"]
    assert metrics["group_sparsity"] == pytest.approx(round(0.7 * units) / units, abs=1e-6)


@pytest.mark.parametrize(
    ("recipe", "settings"), [("resnet50_imagenet", {"width_per_group": 8}), ("mobilenet_v3", {"width_mult": 0.25})]
)
def test_the_recipes_of_imagenet_run(recipe, settings, tmp_path):
    fake_data.imagenet(tmp_path / "data")
    config = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    config["model"]["init_args"]["network"]["init_args"] = settings
    Path("recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    limits = ["--trainer.limit_train_batches=6", "--trainer.max_epochs=2", "--data.workers=0", "--data.size=32"]
    cric = ["--prune.cric.sampling_steps=2", "--prune.cric.max_cycles=1", "--prune.shrink_at_end=false"]
    assert main(["fit", "--config=recipe.yaml", *QUIET, *SMALL, *limits, *STEPS, *cric]) == 0
    sparsity = config["prune"]["init_args"]["target_group_sparsity"]
    assert result(tmp_path)["metrics"]["group_sparsity"] == pytest.approx(sparsity, abs=1e-3)
