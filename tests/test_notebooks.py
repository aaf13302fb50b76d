"""Every notebook runs from its first cell to its last."""

from __future__ import annotations

import json
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
    assert sorted(n.stem for n in NOTEBOOKS.glob("*.ipynb")) == ["gradual_pruning", "pruning_at_initialization"]


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
