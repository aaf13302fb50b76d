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
from pl_prune.core.group_budget import select_units
from pl_prune.models import ConvNet, ResNet

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "structured").glob("*.yaml"))
METHODS = [r for r in RECIPES if "_" not in r.stem]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SMALL = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def test_every_recipe_is_found():
    assert len(METHODS) == 7
    assert len(RECIPES) == 18


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Starting from v1.9.0")
@pytest.mark.parametrize("recipe", METHODS, ids=lambda p: p.stem)
def test_a_methods_recipe_trains_a_smaller_network_and_tests_its_checkpoint(recipe, tmp_path):
    files = [f"--config={recipe}", f"--config={ROOT / 'recipes/settings/convnet_digits.yaml'}"]
    assert main(["fit", *files, *QUIET, *SMALL, "--prune.samples.per_class=4"]) == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert main(["test", *files, *QUIET, "--trainer.limit_test_batches=1", f"--ckpt_path={checkpoint}"]) == 0
    whole = ConvNet().state_dict()
    kept = sum(weights[f"network.{name}"].numel() for name in whole) / sum(t.numel() for t in whole.values())
    assert 0.2 < kept < 0.6


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
@pytest.mark.parametrize("shrink", ["true", "false"])
def test_any_criterion_of_entries_is_named_on_the_command_line(shrink, tmp_path):
    files = [f"--config={METHODS[1]}", f"--config={ROOT / 'recipes/settings/convnet_digits.yaml'}"]
    asked = ["--prune.criterion=ByGroup", "--prune.criterion.criterion=SNIP", f"--prune.shrink={shrink}"]
    assert main(["fit", *files, *QUIET, *SMALL, "--prune.samples.per_class=4", *asked]) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["method"].startswith("ByGroup(criterion=SNIP()) at sparsity 0.5 of groups")


@pytest.mark.parametrize(("recipe", "macs"), [("resnet56_cifar10_49", 0.4816), ("resnet56_cifar10_72", 0.7634)])
def test_the_papers_ratios_remove_what_the_recipe_says(recipe, macs):
    config = yaml.safe_load((ROOT / "recipes" / "structured" / f"{recipe}.yaml").read_text())
    ratios = {k.removeprefix("network."): v for k, v in config["prune"]["init_args"]["ratios"].items()}
    groups = plp.trace_groups(ResNet(56), torch.randn(2, 3, 8, 8))
    scores = {root: torch.arange(float(size)) for root, size in groups.sizes.items()}
    keep = select_units(scores, groups, 0.0, ratios=ratios)
    assert len(keep) == 30
    assert all(not bool(mask.all()) for mask in keep.values())
    assert 1 - groups.cost(keep)[1] / groups.cost({})[1] == pytest.approx(macs, abs=2e-3)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_the_papers_recipe_runs(tmp_path, monkeypatch):
    fake_data.cifar(tmp_path / "data", monkeypatch, 10)
    small = ["--data.workers=0", "--prune.samples.per_class=1", "--model.network.depth=20", "--data.batch_size=2"]
    assert (
        main(["fit", "--config", str(ROOT / "recipes/structured/resnet56_cifar10_49.yaml"), *QUIET, *SMALL, *small])
        == 0
    )
