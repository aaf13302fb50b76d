"""The recipes of structured pruning with a paper's settings: what they remove, and that each runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_data
import pytest
import torch
import yaml
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.core.group_budget import select_units
from pl_prune.models import VGG

RECIPES = Path(__file__).parents[2] / "recipes" / "structured"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SMALL = [
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.max_epochs=1",
    "--data.workers=0",
    "--data.batch_size=2",
    "--prune.samples.per_class=1",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def untrained(recipe: str, folder: Path, **settings: object) -> str:
    """Copy a recipe, with other arguments for its network than the weights to download."""
    config = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    config["model"]["init_args"]["network"]["init_args"] = settings
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return f"--config={folder / 'recipe.yaml'}"


@pytest.fixture(scope="module")
def traced():
    """Groups of each network, traced once."""
    return {
        "vgg19": plp.trace_groups(VGG(19, 100), torch.randn(1, 3, 32, 32)),
        "resnet50": plp.trace_groups(models.resnet50(), torch.randn(1, 3, 64, 64)),
        "mobilenetv2": plp.trace_groups(models.mobilenet_v2(), torch.randn(1, 3, 64, 64)),
    }


@pytest.mark.parametrize(
    ("recipe", "macs"),
    [
        ("vgg19_cifar100", 0.884),
        ("resnet50_imagenet_47", 0.578),
        ("resnet50_imagenet_60", 0.658),
        ("resnet50_imagenet_74", 0.795),
        ("mobilenetv2_imagenet", 0.542),
    ],
)
def test_the_papers_ratios_remove_what_the_recipe_says(recipe, macs, traced):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert f"{100 * macs:.1f} %" in text.split("seed_everything")[0]
    init = yaml.safe_load(text)["prune"]["init_args"]
    ratios = {k.removeprefix("network."): v for k, v in init["ratios"].items()}
    groups = traced[recipe.split("_")[0]]
    scores = {root: torch.arange(float(size)) for root, size in groups.sizes.items()}
    keep = select_units(scores, groups, init["sparsity"], ratios=ratios)
    assert all(not bool(mask.all()) for mask in keep.values())
    gone = 1 - groups.cost(keep)[1] / groups.cost({})[1]
    assert gone == pytest.approx(macs, abs=0.01)  # 64 pixels instead of 224 change it by as much


def test_the_papers_macs_can_be_met_with_its_share_of_the_streams(traced):
    groups = traced["resnet50"]
    scores = {root: torch.arange(float(size)) for root, size in groups.sizes.items()}
    keep = select_units(scores, groups, 0.477, "macs", plp.Layerwise(), ratios={"layer*.0.conv3": 0.25})
    assert 0.477 <= 1 - groups.cost(keep)[1] / groups.cost({})[1] < 0.478
    streams = [name for name in groups.sizes if name.endswith(".0.conv3")]
    assert len(streams) == 4
    assert {float((~keep[name]).double().mean()) for name in streams} == {0.25}


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_norms_of_resnet50_have_a_decay_of_their_own(tmp_path):
    fake_data.imagenet(tmp_path / "data")
    recipe = untrained("resnet50_imagenet_47", tmp_path)
    assert main(["fit", recipe, *QUIET, *SMALL, "--data.size=32"]) == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    weights, norms = state["optimizer_states"][0]["param_groups"]
    assert [len(g["params"]) for g in (weights, norms)] == [54, 107]  # 53 norms, and the bias of the output layer
    assert [(g["weight_decay"], g["momentum"]) for g in (weights, norms)] == [(1e-4, 0.9), (5e-5, 0.0)]
    assert state["state_dict"]["network.layer1.0.conv1.weight"].shape == (38, 38, 1, 1)  # 60 % of 64
    assert state["state_dict"]["network.layer1.0.conv3.weight"].shape == (192, 38, 1, 1)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_mobilenetv2_runs(tmp_path):
    fake_data.imagenet(tmp_path / "data")
    recipe = untrained("mobilenetv2_imagenet", tmp_path, width_mult=0.25)
    assert main(["fit", recipe, *QUIET, *SMALL, "--data.size=32"]) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["method"].startswith("PROscore()")


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_vgg19_runs(tmp_path, monkeypatch):
    fake_data.cifar(tmp_path / "data", monkeypatch, 100)
    assert main(["fit", f"--config={RECIPES / 'vgg19_cifar100.yaml'}", *QUIET, *SMALL]) == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    kept = [t.shape[0] for name, t in weights.items() if name.startswith("network.features") and t.ndim == 4]
    assert kept == [22, 22, 45, 45, 90, 90, 90, 90, *[154] * 4, *[205] * 4]


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_the_vision_transformer_runs(tmp_path, monkeypatch):
    def small(image_size=224, weights=None):
        return VisionTransformer(image_size, 16, 2, 10, 40, 80)

    monkeypatch.setattr(models, "vit_b_16", small)
    fake_data.cifar(tmp_path / "data", monkeypatch, 10)
    recipe = untrained("vit_b_16_cifar10", tmp_path, image_size=32, num_classes=10)
    assert main(["fit", recipe, *QUIET, *SMALL, "--data.image_size=32"]) == 0
    (result,) = tmp_path.rglob("result.json")
    method = json.loads(result.read_text())["method"]
    assert "HutchinsonPruning" in method
    assert "at sparsity 0.75 of macs, Layerwise(min_per_layer=1), not exact, sliced off" in method
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert weights["network.conv_proj.weight"].shape[0] in (14, 15)  # of 40, as 80 of 220 units in all
