"""What can leave a recipe's network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.models import ConvNet, ImageClassifier, ViT

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = ["--config", str(RECIPES / "quickstart.yaml"), "--trainer.callbacks=[]"]
DIGITS = [*RECIPE, "--model.network.width=4"]
VIT = [
    "--model.network=pl_prune.models.ViT",
    "--model.network.init_args={image: 8, patch: 4, width: 16, depth: 1, heads: 2}",
    "--data.channels=3",
]
X = torch.rand(2, 1, 8, 8)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def told(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main(["groups", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_groups_are_those_of_trace_groups_and_the_preview_that_of_any_criterion(capsys, tmp_path):
    found = told(capsys, *DIGITS, "--preview", "0.3", "0.5")
    model = ImageClassifier(ConvNet(width=4))
    groups = plp.trace_groups(model, X)
    assert {one["root"]: one["units"] for one in found["groups"]} == groups.sizes
    assert found["rejected"] == groups.rejected
    assert (found["params"], found["macs"]) == groups.cost({})
    for one in found["groups"]:
        size = one["units"]
        for gone in (0, size - 1):  # any unit
            left = groups.cost({one["root"]: torch.arange(size) != gone})
            assert (found["params"] - left[0], found["macs"] - left[1]) == (
                one["params_per_unit"],
                one["macs_per_unit"],
            )
        group = groups[one["root"]]
        assert [(m["name"], m["kind"]) for m in one["members"]] == [(m.name, m.kind) for m in group.members]
    units = groups.reduce({name: p.detach().abs() for name, p in model.named_parameters()})
    for one in found["preview"]:
        keep = plp.Layerwise(min_per_layer=1)(units, one["sparsity"])
        small = plp.shrink(model, groups.expand(keep), X, groups)
        assert one["params"] == sum(p.numel() for p in small.parameters())
        assert (one["params"], one["macs"]) == groups.cost(keep)
        assert one["params_share"] == one["params"] / found["params"]
        assert one["macs_share"] == one["macs"] / found["macs"]
    assert not list(tmp_path.iterdir())

    assert main(["groups", *DIGITS, "--preview", "0.3", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "it reaches the output of the model" in text
    assert f"{found['preview'][1]['params']:,}" in text
    assert "Layer-wise" in text


def test_a_recipe_that_prunes_structures_gives_the_defaults(capsys):
    first, second, third = (f"network.features.{i}" for i in (0, 3, 6))
    prune = ["--prune=StructuredPruning", f"--prune.exclude=[{first}]"]
    assert {one["root"] for one in told(capsys, *DIGITS, *prune)["groups"]} == {second, third}
    found = told(capsys, *DIGITS, *prune, "--exclude", second)  # which reads the first
    assert {one["root"] for one in found["groups"]} == {third}
    found = told(capsys, *DIGITS, *prune, "--include", second)
    assert {one["root"] for one in found["groups"]} == {second}


def test_units_whose_removal_changes_outputs_are_marked(capsys):
    exact = told(capsys, *RECIPE, *VIT)
    assert all(one["exact"] for one in exact["groups"])
    found = told(capsys, *RECIPE, *VIT, "--inexact")
    network = ViT(image=8, patch=4, width=16, depth=1, heads=2)
    groups = plp.trace_groups(ImageClassifier(network), X.expand(2, 3, 8, 8), exact=False)
    assert {one["root"]: one["exact"] for one in found["groups"]} == {group.root: group.exact for group in groups}
    assert len(found["groups"]) > len(exact["groups"])
    assert main(["groups", *RECIPE, *VIT, "--inexact"]) == 0
    text = capsys.readouterr().out
    assert "changes outputs" in text
    assert "network.position" in text  # a parameter that no layer holds


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--exclude", "network.*"], "at least one layer whose units can leave"),
        (["--include", "network.head"], "network.head"),
        (["--exclude", "network.tail"], "Did you mean 'network.head'?"),
        (["--preview", "1.5"], "sparsity in [0, 1)"),
    ],
)
def test_what_is_refused(argv, said, capsys):
    assert main(["groups", *DIGITS, *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert not captured.out
