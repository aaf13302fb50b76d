"""From a recipe to scores, from scores to masks, and from two masks to their difference."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import pl_prune as plp
from pl_prune.__main__ import main

RECIPE = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.callbacks=[]"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    file = tmp_path_factory.mktemp("commands") / "scores.safetensors"
    assert main(["score", "--config", RECIPE, "--out", str(file), "--json", *QUIET]) == 0
    return file


def refused(capfd, *argv):
    """Run a command that must refuse; return what it says."""
    capfd.readouterr()
    assert main(list(argv)) == 2
    return capfd.readouterr().err


def test_scores_of_a_recipe_are_those_of_its_fit(scores, tmp_path, capfd):
    assert not any(file.name != scores.name for file in scores.parent.iterdir())
    log = ["--trainer.logger.save_dir", str(tmp_path), "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", RECIPE, *log]) == 0
    run = plp.RunFolder(tmp_path / "quickstart" / "snip")
    found, held = plp.load_scores(scores), run.scores()
    assert list(found) == list(held)
    assert all(torch.equal(found[name], held[name]) for name in held)
    told, known = (plp.read_header(file)["meta"] for file in (scores, run.path / "scores.safetensors"))
    assert told == known
    assert told["seed"] == 42
    assert plp.Global()(found, 0.9) == run.masks()
    capfd.readouterr()
    assert main(["masks", "show", str(run.path / "masks.safetensors")]) == 0
    assert "SNIP() at sparsity 0.9, Global()" in capfd.readouterr().out


def test_masks_of_many_sparsities_are_those_of_each_and_say_where_from(scores, tmp_path, capsys):
    sparsities = [0.98, 0.5, 0.9]
    argv = ["mask", "--scores", str(scores), "--sparsity", *map(str, sparsities), "--out-dir", str(tmp_path / "new")]
    assert main([*argv, "--allocation", "ERK", "--allocation.min_per_layer", "1", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [one["sparsity"] for one in written] == sparsities
    for one in written:
        masks = plp.load_masks(one["masks"])
        assert masks == plp.ERK(min_per_layer=1)(plp.load_scores(scores), one["sparsity"])
        assert one["kept"] == sum(kept for kept, _ in masks.counts().values())
        meta = plp.read_header(one["masks"])["meta"]
        assert meta["scores"] == plp.read_header(scores)["digest"]
        assert meta["allocation"]["init_args"]["min_per_layer"] == 1
        assert meta["criterion"]["class_path"].endswith("SNIP")
        assert str(one["sparsity"]) in meta["method"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert all(f"masks-{sparsity}.safetensors" in table for sparsity in sparsities)
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_masks_train(scores, tmp_path, capfd):
    assert main(["mask", "--scores", str(scores), "--sparsity", "0.95", "--out-dir", str(tmp_path)]) == 0
    file = tmp_path / "masks-0.95.safetensors"
    recipe = tmp_path / "recipe.yaml"
    argv = ["--config", RECIPE, "--prune.masks", str(file), "--prune.sparsity=null", "--trainer.max_epochs=1"]
    argv += ["--trainer.logger.save_dir", str(tmp_path), "--trainer.enable_progress_bar=false"]
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *argv, "--print_config"])
    recipe.write_text(capfd.readouterr().out)
    assert str(file) in recipe.read_text()
    assert main(["fit", "--config", str(recipe)]) == 0
    assert plp.RunFolder(tmp_path / "quickstart" / "snip").masks() == plp.load_masks(file)


def test_the_difference_of_two_masks(tmp_path, capsys):
    one = plp.MaskSet({"a": torch.tensor([True, True, False, False]), "b": torch.zeros(6, dtype=torch.bool)})
    two = plp.MaskSet({"a": torch.tensor([True, False, True, True]), "b": torch.zeros(6, dtype=torch.bool)})
    plp.save_masks(tmp_path / "one", one)
    plp.save_masks(tmp_path / "two", two)
    argv = ["masks", "diff", str(tmp_path / "one"), str(tmp_path / "two")]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["hamming"], found["iou"]) == (0.3, 0.25)
    assert found["layers"]["a"] == {"hamming": 0.75, "iou": 0.25, "kept": [2, 3]}
    assert found["layers"]["b"] == {"hamming": 0.0, "iou": 1.0, "kept": [0, 0]}
    assert found["sparsity"] == [0.8, 0.7]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "Hamming distance 0.300000, intersection over union 0.250000" in text
    assert "0.7500" in text
    assert main(["masks", "show", str(tmp_path / "one"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["layers"]["a"] == {"shape": [4], "kept": 2, "entries": 4, "sparsity": 0.5}
    assert (shown["kept"], shown["selected"]) == (2, 10)


def test_bad_input_is_refused_and_nothing_is_written(scores, tmp_path, capfd):
    out = tmp_path / "out"
    mask = ["mask", "--scores", str(scores), "--out-dir", str(out)]
    assert "at least one sparsity" in refused(capfd, *mask, "--sparsity")
    assert "[0, 1)" in refused(capfd, *mask, "--sparsity", "0.9", "95")
    assert "min_per_layer" in refused(capfd, *mask, "--sparsity", "0.5", "0.999", "--allocation.min_per_layer=1000")
    plp.save_masks(tmp_path / "m", plp.MaskSet({"a": torch.ones(3, dtype=torch.bool)}))
    plp.save_masks(tmp_path / "n", plp.MaskSet({"a": torch.ones(4, dtype=torch.bool)}))
    assert "one of masks" in refused(capfd, "mask", "--scores", str(tmp_path / "m"), "--sparsity", "0.5")
    assert "one of scores" in refused(capfd, "masks", "show", str(scores))
    assert "one architecture" in refused(capfd, "masks", "diff", str(tmp_path / "m"), str(tmp_path / "n"))
    assert "found none at" in refused(capfd, "masks", "show", str(tmp_path / "nothing"))
    dense = ["score", "--config", RECIPE, "--out", str(out / "s"), "--prune=Dense", *QUIET]
    assert "found 0 pruning callbacks (none)" in refused(capfd, *dense)
    gradual = ["score", "--config", RECIPE, "--out", str(out / "s"), "--prune=GradualPruning", *QUIET]
    assert "found 1 pruning callbacks (GradualPruning)" in refused(capfd, *gradual)
    assert not out.exists()


def test_scores_that_compare_nothing_between_layers_want_a_budget_for_each(tmp_path, capfd):
    plp.save_scores(tmp_path / "s", {"a": torch.rand(8), "b": torch.rand(8)}, {"layerwise_only": True})
    mask = ["mask", "--scores", str(tmp_path / "s"), "--sparsity", "0.5", "--out-dir", str(tmp_path)]
    assert "compare nothing between layers" in refused(capfd, *mask)
    assert main([*mask, "--allocation", "Layerwise"]) == 0


def test_rounds_count_of_every_callback_whose_scores_a_file_holds(tmp_path, capfd):
    rounds = {"rounds": 5, "sparsity": 0.8}
    plp.save_scores(tmp_path / "s", {"a": torch.rand(8)}, {"rounds": 1, "sparsity": 0.5, "before": rounds})
    mask = ["mask", "--scores", str(tmp_path / "s"), "--out-dir", str(tmp_path), "--sparsity"]
    assert "last of 5 rounds" in refused(capfd, *mask, "0.6")
    assert main([*mask, "0.8"]) == 0


@pytest.mark.parametrize(
    "meta", [{"rounds": "many"}, {"rounds": None}, {"rounds": 3, "sparsity": "high"}, {"before": 1}]
)
def test_a_user_may_call_anything_rounds(tmp_path, meta):
    plp.save_scores(tmp_path / "s", {"a": torch.rand(8)}, meta)
    assert main(["mask", "--scores", str(tmp_path / "s"), "--out-dir", str(tmp_path), "--sparsity", "0.5"]) == 0


def test_what_the_page_shows_runs(tmp_path, monkeypatch, capsys):
    page = (Path(RECIPE).parents[1] / "docs" / "scores_and_masks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(code, space)
    assert capsys.readouterr().out.strip() == str(round(0.9 * 128) / 128)
    assert int((space["model"][0].weight == 0).sum()) == round(0.9 * 128)
