"""Every notebook runs from its first cell to its last."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(name: str) -> dict:
    cells = [c for c in json.loads((NOTEBOOKS / name).read_text())["cells"] if c["cell_type"] == "code"]
    space: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), space)
    return space


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_notebook_is_run_here():
    assert sorted(n.stem for n in NOTEBOOKS.glob("*.ipynb")) == [
        "adversarial",
        "adversarial_pruning",
        "gradual_pruning",
        "hesso",
        "pruning_at_initialization",
        "structured_pruning",
        "studies",
        "yopo_reuse",
    ]


@pytest.mark.filterwarnings("default")
def test_pruning_at_initialization(capsys):
    space = execute("pruning_at_initialization.ipynb")
    assert set(space["accuracy"]) == {"Dense", *(type(c).__name__ for c in space["criteria"])}
    assert space["accuracy"]["Dense"] > 0.9
    assert "SNIP" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_gradual_pruning(capsys):
    space = execute("gradual_pruning.ipynb")
    assert space["accuracy"]["dense"] > 0.9
    assert space["accuracy"]["cubic, magnitude"] > space["accuracy"]["at init, SNIP"] - 0.1
    assert space["after_resume"] == space["accuracy"]["cubic, magnitude"]
    assert "the same masks: True" in capsys.readouterr().out
    total = sum(size for _, size in space["further"].masks.counts().values())
    assert round(space["further"].masks.sparsity() * total) == int(0.95 * total + 0.5)


@pytest.mark.filterwarnings("default")
def test_studies(capsys, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    space = execute("studies.ipynb")
    assert space["status"] == space["again"] == space["found"] == 0
    assert len(space["results"]) == 26
    dense, *_, last = space["results"]
    assert dense["row"] == "dense"
    assert dense["last"] > 0.8
    assert space["run"].masks().sparsity() == last["sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert (space["here"] / "notebook" / "report.html").is_file()
    assert len(space["figures"]) >= 4
    said = capsys.readouterr().out
    assert "best val/acc" in said
    assert "best of SNIP: val/acc" in said


@pytest.mark.filterwarnings("default")
def test_adversarial(capsys):
    space = execute("adversarial.ipynb")
    assert space["results"]["plain"].clean > 0.9
    for name in ("Fast", "TRADES"):
        assert space["results"][name].robust > space["results"]["plain"].robust + 0.2
    assert [curve[-1].robust < 0.2 for curve in space["curves"].values()] == [True] * 3
    assert "Take the normalisation out of the data" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_adversarial_pruning(capsys):
    pytest.importorskip("matplotlib").use("Agg")
    space = execute("adversarial_pruning.ipynb")
    results, networks = space["results"], space["networks"]
    assert results["pretrained"].robust > 0.7
    for name, learner in space["learners"].items():
        total = sum(size for _, size in learner.masks.counts().values())
        assert round(learner.masks.sparsity() * total) == pytest.approx(0.9 * total, abs=1)
        for tuned in (f"{name}, tuned", f"{name}, tuned, AWP"):
            assert results[tuned].robust > results[name].robust
            live = dict(networks[tuned].named_parameters())
            assert not any(live[layer][~mask].any() for layer, mask in learner.masks.items())
    hydra, s2ap = ([line["sharpness/largest_eigenvalue"] for line in curve] for curve in space["curves"].values())
    assert hydra[:2] == s2ap[:2]  # in the warm-up both are one
    assert hydra[2:] != s2ap[2:]
    assert space["left"][1] <= 0.25 * space["whole"][1]
    assert sum(p.numel() for p in space["small"].parameters()) == space["left"][0]
    assert space["difference"] < 1e-5
    assert results["channels, tuned"].robust > 0.6
    assert "exact McNemar" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_one_file_of_scores_serves_every_budget():
    space = execute("yopo_reuse.ipynb")
    masks = list(space["masks"].values())
    assert all(wide.intersect(narrow) == narrow for wide, narrow in pairwise(masks))
    assert len(space["accuracy"]) == 7
    assert space["accuracy"]["YOPO 0.8"] > 0.8


@pytest.mark.filterwarnings("default")
def test_structured_pruning(capsys):
    pytest.importorskip("matplotlib").use("Agg")
    space = execute("structured_pruning.ipynb")
    assert sum(space["groups"].sizes.values()) == 448
    assert space["accuracy"](space["network"]) > 0.95
    assert len(space["curve"]) == 4
    assert all(len(values) == 5 for values in space["curve"].values())
    for small in space["after"].values():
        assert sum(p.numel() for p in small.parameters()) < 130_000
        assert space["accuracy"](small) > 0.85
    assert space["difference"] < 1e-4
    assert space["left"][1] <= 0.4 * space["whole"][1]
    assert space["milliseconds"].keys() == {"whole", "masked", "sliced"}
    assert "masked and loaded differ by" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_hesso(capsys):
    pytest.importorskip("matplotlib").use("Agg")
    space = execute("hesso.ipynb")
    units = sum(space["pruner"].groups.sizes.values())
    for name, arm in space["arms"].items():
        assert sum(int((~k).sum()) for k in arm.groups.collapse(arm.masks).values()) == round(0.7 * units), name
    assert int((space["norms"][-1] == 0).sum()) == round(0.7 * units)
    assert space["final"]["HESSO"] > 0.8
    assert space["difference"] < 1e-4
    assert space["count"](space["small"]) < 0.4 * space["count"](space["module"])
    assert "the outputs differ by" in capsys.readouterr().out
