"""Every notebook runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_the_notebooks_are_found():
    assert [n.stem for n in NOTEBOOKS] == ["pruning_at_initialization"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_runs(notebook, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    space: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), space)
    assert set(space["accuracy"]) == {"Dense", *(type(c).__name__ for c in space["criteria"])}
    assert space["accuracy"]["Dense"] > 0.9
    assert "SNIP" in capsys.readouterr().out
