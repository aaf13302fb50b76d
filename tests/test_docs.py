"""The fragments of the pages run with the objects that they speak of."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fragments import run
from lightning.pytorch import Trainer
from torch import nn

import pl_prune as plp
from pl_prune.models import ResNet


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network, inputs = ResNet(20, num_classes=10), torch.rand(4, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 3])
    return {
        **{
            "plp": plp,
            "Trainer": partial(Trainer, logger=False, accelerator="cpu"),
            "model": network,
            "module": network,
            "network": network,
        },
        **{"inputs": inputs, "x": inputs, "y": labels, "batches": [(inputs, labels)]},
        "loss_fn": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    }


def test_yopo(space):
    masks = run("yopo", space)["masks"]
    for sparsity, one in masks.items():
        assert one.sparsity() == pytest.approx(sparsity, abs=1e-5)


def test_scores_and_masks(space, capsys):
    found = run("scores_and_masks", space)
    assert plp.load_masks("masks.safetensors") == found["masks"]
    assert capsys.readouterr().out == f"{found['masks'].sparsity()}\n"


def test_groups(space):
    small = run("groups", space)["small"]
    assert isinstance(small, nn.Module)


def test_structured_pruning(space):
    dense = sum(p.numel() for p in space["model"].parameters())
    groups = plp.trace_groups(space["model"], space["inputs"])
    masks = groups.expand({root: torch.arange(size) > 0 for root, size in groups.sizes.items()})
    space["pruner"] = type("Pruner", (), {"masks": masks, "groups": groups})
    masks.apply_(dict(space["model"].named_parameters()))
    found = run("structured_pruning", space)
    assert sum(p.numel() for p in found["small"].parameters()) < dense
    assert any(isinstance(cb, plp.StructuredPruning) for cb in found["trainer"].callbacks)


def test_export(space, capsys):
    done = run("export", space)["done"]
    assert done.path.is_file()
    assert str(done.bytes) in capsys.readouterr().out


def test_hesso(space):
    space |= {"torch": torch, "path": "small.safetensors"}
    groups = plp.trace_groups(space["model"], space["inputs"])
    half = {root: torch.arange(size) > size // 2 for root, size in groups.sizes.items()}
    plp.save_shrunk(plp.shrink(space["model"], groups.expand(half), space["inputs"], groups), space["path"])
    found = run("hesso", space)
    assert any(isinstance(cb, plp.HESSO) for cb in found["trainer"].callbacks)
    assert sum(int((~k).sum()) for k in found["keep"].values()) == 40
    left = plp.trace_groups(found["small"], space["inputs"]).sizes.values()
    assert sum(left) == sum(groups.sizes.values()) // 2


def test_adversarial_training(space):
    found = run("adversarial_training", space)
    assert any(isinstance(cb, plp.AdversarialTraining) for cb in found["trainer"].callbacks)
    assert isinstance(found["network"], plp.NormalizedModel)


def test_adversarial_pruning(space, tmp_path):
    select = plp.Select(output_layer=True)
    masks = plp.Layerwise()(plp.score(space["model"], plp.Magnitude(), None, None, select), 0.9)
    plp.save_masks(tmp_path / "runs" / "search" / "masks.safetensors", masks)
    found = run("adversarial_pruning", space)
    assert found["pruning"].learner == plp.HYDRA()
    assert any(isinstance(cb, plp.AWP) for cb in found["finetune"].callbacks)
    assert found["kept"].select == select


def test_sharpness(space):
    found = run("sharpness", space)
    assert any(isinstance(cb, plp.ScoreSharpness) for cb in found["trainer"].callbacks)
    assert found["eigenvalue"]
    assert found["rise"] >= 0
    assert (found["of_all"], found["of_kept"]) == (0, 0)
