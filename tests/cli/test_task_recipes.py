"""The recipes of segmentation, super-resolution and detection, run as they are on small networks and folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_tasks
import pytest
import torch
import yaml

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.models import CARN

ROOT = Path(__file__).parents[2]
DEEPLAB = {62: 0.618, 71: 0.709, 80: 0.801}
CARNS = ("hesso", "by_hand", "cric")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SMALL = ["--data.workers=0", "--data.batch_size=1", "--trainer.max_epochs=1"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0", "ignore:The dirpath has changed", "ignore:Discarding init_args"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def test_every_recipe_is_here():
    found = {p.stem for kind in ("hesso", "structured") for p in (ROOT / "recipes" / kind).glob("*.yaml")}
    mine = {name for name in found if name.startswith(("deeplab", "carn", "detection"))}
    assert mine == {
        *(f"deeplabv3_cityscapes_{share}" for share in DEEPLAB),
        *(f"carn_div2k_{kind}" for kind in CARNS),
        "detection_coco",
    }


def fit(recipe, *given):
    assert main(["fit", f"--config={ROOT / 'recipes' / recipe}", *QUIET, *SMALL, *given]) == 0
    (checkpoint,) = Path().rglob("last.ckpt")
    (picture,) = Path().rglob("figures/predictions.png")
    assert picture.with_suffix(".txt").read_text().startswith("Predictions\nThe first validation samples")
    return torch.load(checkpoint, weights_only=True)["state_dict"], str(checkpoint)


def logged(recipe, checkpoint, capsys, *given):
    """Test a checkpoint and return what was logged."""
    capsys.readouterr()
    assert (
        main(["test", f"--config={ROOT / 'recipes' / recipe}", *QUIET, *SMALL, *given, f"--ckpt_path={checkpoint}"])
        == 0
    )
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and row[0].startswith("test/")}


@pytest.mark.parametrize("share", DEEPLAB)
def test_deeplab_loses_the_papers_share_of_its_operations(share, capsys):
    fake_tasks.cityscapes(Path("data/cityscapes"))
    recipe = f"structured/deeplabv3_cityscapes_{share}.yaml"
    crop = ["--data.crop_height=16", "--data.crop_width=16", "--model.example_size=16", "--prune.samples.total=2"]
    given = ["--model.network=fake_tasks.small_deeplab", *crop]
    weights, checkpoint = fit(recipe, *given, "--data.batch_size=2", "--trainer.limit_train_batches=1")
    groups = plp.trace_groups(fake_tasks.small_deeplab(), torch.rand(2, 3, 16, 16))
    sizes = {root: weights[f"network.{root}.weight"].shape[0] for root in groups.sizes}
    keep = {root: torch.arange(size) < sizes[root] for root, size in groups.sizes.items()}
    lost = 1 - groups.cost(keep)[1] / groups.cost({})[1]
    assert DEEPLAB[share] <= lost < DEEPLAB[share] + 0.02
    if share == 80:
        assert set(logged(recipe, checkpoint, capsys, *given)) == {"test/loss", "test/miou"}


@pytest.mark.parametrize("kind", CARNS)
def test_carn_loses_half_of_its_units(kind, capsys):
    fake_tasks.div2k(Path("data/div2k"))
    given = ["--model.network.width=8", "--data.patch=8"]
    recipe = f"hesso/carn_div2k_{kind}.yaml"
    few = ["--prune.cric.sampling_steps=2", "--prune.cric.max_cycles=2"] if kind == "cric" else ["--prune.periods=2"]
    weights, checkpoint = fit(recipe, *given, "--data.patches_per_image=10", *few)
    (result,) = Path().rglob("result.json")
    method = json.loads(result.read_text())["method"]
    assert method.startswith("HESSO at sparsity 0.5 of groups")
    assert ("CRIC(" in method and "preset='paper'" in method) == (kind == "cric")
    exclude = ["upsample.*"] if kind == "by_hand" else None
    groups = plp.trace_groups(CARN(width=8), torch.rand(2, 3, 8, 8), exclude=exclude)
    rows = {root: weights[f"network.{root}.weight"].flatten(1) for root in groups.sizes}
    gone = sum(int((row == 0).all(1).sum()) // (len(row) // groups.sizes[root]) for root, row in rows.items())
    assert gone == sum(groups.sizes.values()) // 2
    assert ("upsample.0" in groups.sizes) == (kind != "by_hand")
    (small,) = Path().rglob("small.safetensors")
    assert small.stat().st_size < 0.8 * Path(checkpoint).stat().st_size
    if kind == "cric":
        found = logged(recipe, checkpoint, capsys, *given)
        assert set(found) == {"test/psnr_Set14", "test/psnr_B100", "test/psnr_Urban100"}


def test_a_detector_loses_its_share_of_units(capsys):
    fake_tasks.coco(Path("data/coco"))
    given = ["--model.network=fake_tasks.small_detector", "--prune.periods=2", "--prune.duration=0.5"]
    weights, checkpoint = fit("hesso/detection_coco.yaml", *given, "--trainer.max_epochs=4")
    groups = plp.trace_groups(fake_tasks.small_detector(), torch.rand(2, 3, 64, 64))
    rows = [(weights[f"network.{root}.weight"].flatten(1) == 0).all(1).sum() for root in groups.sizes]
    assert int(sum(rows)) == int(0.3 * sum(groups.sizes.values()) + 0.5)
    assert set(logged("hesso/detection_coco.yaml", checkpoint, capsys, *given)) == {"test/map", "test/map_50"}


@pytest.mark.parametrize("recipe", ["structured/deeplabv3_cityscapes_62.yaml", "hesso/detection_coco.yaml"])
def test_the_networks_of_the_recipes_are_torchvisions(recipe, capsys):
    wanted = yaml.safe_load((ROOT / "recipes" / recipe).read_text())["model"]["init_args"]["network"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={ROOT / 'recipes' / recipe}", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]
    assert found["class_path"] == wanted["class_path"]
    assert wanted["init_args"].items() <= found["init_args"].items()
    assert found["init_args"]["weights_backbone"] is None
